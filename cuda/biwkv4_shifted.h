// Bi-WKV4 on the CPU, the fast way: each channel's keys are shifted once, by their maximum, after which every sum is a
// plain linear recurrence in float32. Time is cut into chunks whose sums join in float64, so that an error grows with
// the chunk and not with the sequence.
//
// A strip goes through all phases while the caches hold it. It either keeps its weights between phases (short
// sequences: one exponential an element) or computes them again from k (long ones: two of them forward, three backward,
// and as many readings of k and v).
//
// Strips with a channel beyond the bound (biwkv4_arithmetic.h) are left to biwkv4_running.h.
#pragma once

#include "biwkv4_tasks.h"

#include "biwkv4_arithmetic.h"  // after the vector, whose `exponential` and `larger` it calls

namespace biwkv {

constexpr int kRows = 32, kBlock = 8;  // positions of a chunk, and of a block of it

inline int64_t chunks_of(int64_t length) { return (length + kRows - 1) / kRows; }

inline bool all_within_bound(const float* w, const float* u, int64_t lanes, int64_t length) {
  for (int64_t i = 0; i < lanes; ++i) {
    if (!within_bound(w[i], u[i], length)) return false;
  }
  return true;
}

// The sums of one chunk; once joined, the sums of all that comes before it (forth) and after it (back).
struct Chunk {
  Sum<Wide> forth, back;
  Wide max;     // the chunk's own largest key
  Wide centre;  // what the chunk's own sums subtract from v
};

struct GradientChunk {
  Sum<Wide> forth, back;
};

// What all chunks of a strip share: weights are e^(k - shift); the backward pass counts v from `centre`, a mean of v by
// weight, because v - y would otherwise cancel where one key outweighs all others.
struct Frame {
  Wide shift, centre;
};

// What the forward and the backward pass of one strip have in common.
template <class Number>
class ShiftedScan {
 public:
  using V = Wide;

  void open(const Strip<Number>& strip, V w_, V u, Frame* frame_, Chunk* chunks_) {
    s = strip, w = w_, frame = frame_, chunks = chunks_;
    decay = exponential(-w), boost = exponential(u);
    count = chunks_of(s.length);
    for (int half = 0; half < kHalves; ++half) {
      const Doubles exact = exponential(-half_of(w, half)), rounded = half_of(decay, half);
      put_half((exact - rounded) / rounded * kBlock, drift, half);
    }
    V power = {splat<Floats>(1), splat<Floats>(1)};
    for (int64_t t = 0; t < kRows; ++t) {
      powers[t] = power, power = power * decay;
      if (last_of_block(t)) power = settle(power);
    }
  }

  // What this thread will work on next, to be fetched while it works on the present chunk: the rows from `row` on,
  // `channels` off this strip's own.
  void look_ahead(int64_t row, int64_t channels) {
    k_next = {s.k + row * s.k_time + channels, s.k_time};
    v_next = {s.v + row * s.v_time + channels, s.v_time};
    if (s.grad_y) grad_y_next = {s.grad_y + row * s.grad_y_time + channels, s.grad_y_time};
  }

 protected:
  static constexpr int kLine = 64 / sizeof(Number);  // numbers in a cache line

  // A walk over rows to come, into the second-level cache: the first has no room for them.
  struct Ahead {
    const Number* at;
    int64_t time;

    void fetch() {
      for (int i = 0; i < Lanes<V>::count; i += kLine) __builtin_prefetch(at + i, 0, 2);
      at += time;
    }
  };

  // A decay is rounded, each time alike: 32 roundings would add up. What those of a block do is made good at its end.
  V settle(V power) const { return power + power * drift; }
  Sum<V> settle(const Sum<V>& sum) const { return {settle(sum.n), settle(sum.d)}; }
  static bool last_of_block(int64_t t) { return t % kBlock == kBlock - 1; }
  static bool first_of_block(int64_t t) { return t % kBlock == 0; }

  void fetch_to_write(Number* p) const {
    if (s.past_cache) return;
    for (int i = 0; i < Lanes<V>::count; i += kLine) __builtin_prefetch(p + i, 1, 2);
  }
  void write(V x, Number* p) const { s.past_cache ? narrow_past_cache(x, p) : narrow_two(x, p); }

  void find_max(int64_t c) {
    const Number* k = k_at(c);
    const Floats lowest = splat<Floats>(-3.40282347e38f);  // above -inf: a chunk of nothing but -inf is zeros, not NaN
    V max = {lowest, lowest};
    for (int64_t t = 0, end = rows_of(c); t < end; ++t, k += s.k_time) max = larger(max, widen_two(k));
    chunks[c].max = max;
  }

  // The weights of a chunk, e^(k - shift).
  template <class Row>
  void weigh(int64_t c, V shift, Row* rows) const {
    constexpr int step = 4;
    const Number* k = k_at(c);
    Ahead next = k_next;
    const int64_t end = rows_of(c);
    int64_t t = 0;
    for (; t + step <= end; t += step, k += step * s.k_time) {
      V x[step];
      for (int i = 0; i < step; ++i) next.fetch(), x[i] = widen_two(k + i * s.k_time) - shift;
      exponentials(x);
      for (int i = 0; i < step; ++i) rows[t + i].x = x[i];
    }
    for (; t < end; ++t, k += s.k_time) rows[t].x = exponential(widen_two(k) - shift);
  }

  // Half of the whole decay on either side of the largest key: the weights' sums stay near one.
  void find_shift() {
    V max = chunks[0].max;
    for (int64_t c = 1; c < count; ++c) max = larger(max, chunks[c].max);
    frame->shift = max - w * (0.5f * s.length);
  }

  static constexpr int kHalves = 4, kHalf = Lanes<Doubles>::count;

  static Doubles half_of(const V& x, int half) {
    return widen<Doubles>(reinterpret_cast<const float*>(&x) + half * kHalf);
  }
  static void put_half(Doubles x, V& to, int half) { narrow(x, reinterpret_cast<float*>(&to) + half * kHalf); }

  int64_t begin(int64_t c) const { return c * kRows; }
  int64_t rows_of(int64_t c) const { return c + 1 < count ? kRows : s.length - c * kRows; }
  const Number* k_at(int64_t c) const { return s.k + begin(c) * s.k_time; }
  const Number* v_at(int64_t c) const { return s.v + begin(c) * s.v_time; }
  Doubles skip(int half) const { return exponential(-half_of(w, half) * kRows); }

  // From a chunk's own sum to the sum of all before it; `sum` goes on to the next chunk.
  static void pass_on(Sum<Doubles>& sum, Doubles skip, Sum<V>& chunk, Doubles uncentre, int half) {
    const Doubles d = half_of(chunk.d, half), n = half_of(chunk.n, half) + uncentre * d;
    put_half(sum.n, chunk.n, half), put_half(sum.d, chunk.d, half);
    sum = sum_push(sum, skip, n, d);
  }

  // Brings sums that were shifted by their own chunk's maximum to the strip's shift.
  void scale_chunks(int half) {
    const Doubles shift = half_of(frame->shift, half);
    for (int64_t c = 0; c < count; ++c) {
      const Doubles scale = exponential(half_of(chunks[c].max, half) - shift);
      for (Sum<V>* sum : {&chunks[c].forth, &chunks[c].back}) {
        put_half(half_of(sum->n, half) * scale, sum->n, half);
        put_half(half_of(sum->d, half) * scale, sum->d, half);
      }
    }
  }

  // Brings sums from their own chunk's centre to the strip's, and each to the sum of all before (after) its chunk.
  void join_chunks(int half) {
    const Doubles centre = half_of(frame->centre, half), decay_of_chunk = skip(half);
    Sum<Doubles> forth = {}, back = {};
    for (int64_t c = 0; c < count; ++c) {
      pass_on(forth, decay_of_chunk, chunks[c].forth, half_of(chunks[c].centre, half) - centre, half);
    }
    for (int64_t c = count - 1; c >= 0; --c) {
      pass_on(back, decay_of_chunk, chunks[c].back, half_of(chunks[c].centre, half) - centre, half);
    }
  }

  Strip<Number> s;
  Ahead k_next, v_next, grad_y_next;
  V w, boost, decay, drift;  // drift: what a block's roundings of the decay have lost, relatively
  Frame* frame;
  Chunk* chunks;
  int64_t count;
  V powers[kRows];  // decay^t
};

}  // namespace biwkv
