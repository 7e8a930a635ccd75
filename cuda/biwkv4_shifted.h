// Bi-WKV4 on the CPU, the fast way: each channel's keys are shifted once, by their maximum, after which every sum is a
// plain linear recurrence in float32. Time is cut into chunks whose sums join in float64, so that an error grows with
// the chunk and not with the sequence. A chunk is read twice forward and three times backward, from cache where the
// sequence fits in it.
//
// Bound: -20 <= w T <= 60 and |u| <= 20. Within it a key that underflows after the shift weighs less than e^-27 of any
// sum that it enters, and no sum or gradient leaves float32's range. Beyond it biwkv4_running.h takes over.
#pragma once

#include "biwkv4_strip.h"
#include "biwkv4_vector.h"

#include "biwkv4_arithmetic.h"  // after the vector, whose `exponential` and `larger` it calls

namespace biwkv {

// The sums of one chunk; once joined, the sums of all that comes before it (forth) and after it (back).
struct Chunk {
  Sum<Floats> forth, back;
  Floats max;     // the chunk's own largest key: the shift of its own sums
  Floats centre;  // what its own sums subtract from v
};

struct GradientChunk {
  Sum<Floats> forth, back;
};

// What all chunks of a strip share: weights are e^(k - shift); the backward pass counts v from `centre`, a mean of v by
// weight, because v - y would otherwise cancel where one key outweighs all others.
struct Frame {
  Floats shift, centre;
};

template <class Number>
class ShiftedScan {
 public:
  using V = Floats;
  static constexpr int kRows = 64;  // rows of a chunk

  static int64_t chunks_of(int64_t length) { return (length + kRows - 1) / kRows; }

  static bool within_bound(V w, V u, int64_t length) {
    for (int i = 0; i < Lanes<V>::count; ++i) {
      const float whole = w[i] * length;
      if (!(whole >= -20 && whole <= 60 && u[i] >= -20 && u[i] <= 20)) return false;
    }
    return true;
  }

  void open(const Strip<Number>& strip, V w_, V u_, Frame* frame_, Chunk* chunks_, GradientChunk* gradients_) {
    s = strip, w = w_, frame = frame_, chunks = chunks_, gradients = gradients_;
    decay = exponential(-w), boost = exponential(u_);
    count = chunks_of(s.length);
    for (int half = 0; half < kHalves; ++half) {
      const Doubles factor = exponential(-half_of(w, half));
      Doubles power = splat<Doubles>(1);
      for (V& p : powers) put_half(power, p, half), power *= factor;
    }
  }

  // First reading: each chunk's own sums, shifted by its own largest key.
  template <bool centred>
  void sum_keys(int64_t c) {
    Chunk& chunk = chunks[c];
    const Number *k = s.k + begin(c) * s.k_time, *v = s.v + begin(c) * s.v_time;
    const int64_t rows = rows_of(c);
    // Above -inf, so that a chunk of nothing but -inf is zeros and not NaN.
    V max = splat<V>(-3.4e38f);
    for (int64_t t = 0; t < rows; ++t) max = larger(max, load_row(k, t * s.k_time));
    Sum<V> forth = {}, back = {};
    V centre = {};
    if constexpr (centred) {
      Sum<V> sum = {};
      for (int64_t t = 0; t < rows; ++t) {
        const V x = exponential(load_row(k, t * s.k_time) - max);
        sum = {sum.n + x * load_row(v, t * s.v_time), sum.d + x};
      }
      centre = sum.n / sum.d;
      centre = centre == centre ? centre : V{};
    }
    for (int64_t t = 0; t < rows; ++t) {
      const V x = exponential(load_row(k, t * s.k_time) - max);
      const V xv = x * (load_row(v, t * s.v_time) - centre);
      forth = sum_push(forth, decay, xv, x);
      back = {back.n + powers[t] * xv, back.d + powers[t] * x};
    }
    chunk = {forth, back, max, centre};
  }

  void join_keys() {
    V max = chunks[0].max;
    for (int64_t c = 1; c < count; ++c) max = larger(max, chunks[c].max);
    frame->shift = max - w * (0.5f * s.length);
    for (int half = 0; half < kHalves; ++half) join_keys(half);
  }

  // Second reading: the output.
  void write_output(int64_t c) {
    const Number *k = s.k + begin(c) * s.k_time, *v = s.v + begin(c) * s.v_time;
    Number* y = s.y + begin(c) * s.out_time;
    Sum<V> own[kRows], after[kRows];
    Sum<V> sum = chunks[c].back;
    const V shift = frame->shift;
    for (int64_t t = rows_of(c) - 1; t >= 0; --t) {
      const V x = exponential(load_row(k, t * s.k_time) - shift), xv = x * load_row(v, t * s.v_time);
      own[t] = {xv, x}, after[t] = sum;
      sum = sum_push(sum, decay, xv, x);
    }
    sum = chunks[c].forth;
    for (int64_t t = 0; t < rows_of(c); ++t) {
      const V n = sum.n + after[t].n + boost * own[t].n, d = sum.d + after[t].d + boost * own[t].d;
      store(n / d, y + t * s.out_time, s.lanes);
      sum = sum_push(sum, decay, own[t].n, own[t].d);
    }
  }

  // Second reading of the backward pass: each chunk's own sums of a = grad / D and b = a y.
  void sum_gradients(int64_t c) {
    const Number* grad_y = s.grad_y + begin(c) * s.grad_y_time;
    Row rows[kRows];
    scan_back(c, rows);
    Sum<V> sum = chunks[c].forth, forth = {}, back = {};
    for (int64_t t = 0; t < rows_of(c); ++t) {
      const Row& row = rows[t];
      const V n = sum.n + row.after.n + boost * row.x * row.v, d = sum.d + row.after.d + boost * row.x;
      const V inverse = 1 / d, a = load_row(grad_y, t * s.grad_y_time) * inverse, b = a * n * inverse;
      sum = sum_push(sum, decay, row.x * row.v, row.x);
      forth = sum_push(forth, decay, a, b);
      back = {back.n + powers[t] * a, back.d + powers[t] * b};
    }
    gradients[c] = {forth, back};
  }

  void join_gradients() {
    for (int half = 0; half < kHalves; ++half) {
      const Doubles skip = exponential(-half_of(w, half) * kRows);
      Sum<Doubles> sum = {};
      for (int64_t c = 0; c < count; ++c) pass_on(sum, skip, gradients[c].forth, Doubles{}, half);
      sum = Sum<Doubles>{};
      for (int64_t c = count - 1; c >= 0; --c) pass_on(sum, skip, gradients[c].back, Doubles{}, half);
    }
  }

  // Third reading: the gradients of k and v; those of w and u are added to the two sums.
  void write_gradients(int64_t c, double* grad_w, double* grad_u) {
    const Number* grad_y = s.grad_y + begin(c) * s.grad_y_time;
    Row rows[kRows];
    Later later[kRows];
    scan_back(c, rows);
    Sum<V> before = chunks[c].forth, earlier = gradients[c].forth;
    V to_w = {}, to_u = {};
    for (int64_t t = 0; t < rows_of(c); ++t) {
      const Row& row = rows[t];
      const V own = boost * row.x;
      const Output<V> out = sum_output(before, row.after, own, row.v);
      const V a = load_row(grad_y, t * s.grad_y_time) * out.inverse, b = a * out.y, bonus = own * a * out.off;
      later[t] = {a, b, before, row.x * (row.v * earlier.n - earlier.d) + bonus, row.x * earlier.n + own * a};
      to_u += bonus;
      to_w -= flux(row.after, earlier);
      before = sum_push(before, decay, row.x * row.v, row.x);
      earlier = sum_push(earlier, decay, a, b);
    }
    Sum<V> sum = gradients[c].back;
    for (int64_t t = rows_of(c) - 1; t >= 0; --t) {
      const Later& row = later[t];
      const V x = rows[t].x;
      store(row.grad_k + x * (rows[t].v * sum.n - sum.d), s.grad_k + (begin(c) + t) * s.out_time, s.lanes);
      store(row.grad_v + x * sum.n, s.grad_v + (begin(c) + t) * s.out_time, s.lanes);
      to_w -= flux(row.before, sum);
      sum = sum_push(sum, decay, row.a, row.b);
    }
    to_w *= decay;
    for (int i = 0; i < Lanes<V>::count; ++i) grad_w[i] += to_w[i], grad_u[i] += to_u[i];
  }

 private:
  struct Row {
    V x, v;
    Sum<V> after;
  };
  struct Later {
    V a, b;
    Sum<V> before;
    V grad_k, grad_v;  // all but what later positions add
  };
  static constexpr int kHalves = 2, kHalf = Lanes<Doubles>::count;

  static Doubles half_of(const V& x, int half) {
    return widen<Doubles>(reinterpret_cast<const float*>(&x) + half * kHalf);
  }
  static void put_half(Doubles x, V& to, int half) { narrow(x, reinterpret_cast<float*>(&to) + half * kHalf); }
  int64_t begin(int64_t c) const { return c * kRows; }
  int64_t rows_of(int64_t c) const { return c + 1 < count ? kRows : s.length - c * kRows; }
  V load_row(const Number* row, int64_t offset) const { return load<V>(row + offset, s.lanes); }

  // From a chunk's own sum to the sum of all before it; `sum` goes on to the next chunk.
  static void pass_on(Sum<Doubles>& sum, Doubles skip, Sum<V>& chunk, Doubles uncentre, int half) {
    const Doubles d = half_of(chunk.d, half), n = half_of(chunk.n, half) + uncentre * d;
    put_half(sum.n, chunk.n, half), put_half(sum.d, chunk.d, half);
    sum = sum_push(sum, skip, n, d);
  }

  static void scale_by(Sum<V>& sum, Doubles scale, int half) {
    put_half(half_of(sum.n, half) * scale, sum.n, half), put_half(half_of(sum.d, half) * scale, sum.d, half);
  }

  void join_keys(int half) {
    const Doubles shift = half_of(frame->shift, half);
    Sum<Doubles> all = {};
    for (int64_t c = 0; c < count; ++c) {
      const Doubles scale = exponential(half_of(chunks[c].max, half) - shift);
      scale_by(chunks[c].forth, scale, half), scale_by(chunks[c].back, scale, half);
      const Doubles d = half_of(chunks[c].forth.d, half) + half_of(chunks[c].back.d, half);
      all = {all.n + d * half_of(chunks[c].centre, half), all.d + d};
    }
    const Doubles mean = all.n / all.d;
    put_half(mean == mean ? mean : Doubles{}, frame->centre, half);
    const Doubles centre = half_of(frame->centre, half), skip = exponential(-half_of(w, half) * kRows);
    Sum<Doubles> forth = {}, back = {};
    for (int64_t c = 0; c < count; ++c) {
      pass_on(forth, skip, chunks[c].forth, half_of(chunks[c].centre, half) - centre, half);
    }
    for (int64_t c = count - 1; c >= 0; --c) {
      pass_on(back, skip, chunks[c].back, half_of(chunks[c].centre, half) - centre, half);
    }
  }

  void scan_back(int64_t c, Row* rows) const {
    const Number *k = s.k + begin(c) * s.k_time, *v = s.v + begin(c) * s.v_time;
    const V shift = frame->shift, centre = frame->centre;
    Sum<V> sum = chunks[c].back;
    for (int64_t t = rows_of(c) - 1; t >= 0; --t) {
      Row& row = rows[t];
      row = {exponential(load_row(k, t * s.k_time) - shift), load_row(v, t * s.v_time) - centre, sum};
      sum = sum_push(sum, decay, row.x * row.v, row.x);
    }
  }

  Strip<Number> s;
  V w, decay, boost;
  Frame* frame;
  Chunk* chunks;
  GradientChunk* gradients;
  int64_t count;
  V powers[kRows];  // decay^t
};

}  // namespace biwkv
