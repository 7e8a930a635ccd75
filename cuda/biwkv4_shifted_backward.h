// The backward pass of one strip under one shift (biwkv4_shifted.h). With v counted from the frame's centre throughout.
#pragma once

#include "biwkv4_shifted.h"

namespace biwkv {

template <class Number>
class ShiftedBackward : public ShiftedScan<Number> {
  using Base = ShiftedScan<Number>;
  using Base::begin, Base::boost, Base::chunks, Base::count, Base::decay, Base::frame, Base::half_of, Base::kHalves,
      Base::powers, Base::put_half, Base::rows_of, Base::s, Base::v_at;

 public:
  using V = Wide;
  struct Row {
    V x, v;         // weight and centred value
    V a, b, bonus;  // grad / D, a y, and the part of grad_k that goes through the own term
  };

  static int64_t kept_bytes(int64_t length) { return chunks_of(length) * kRows * sizeof(Row); }

  void attach(GradientChunk* gradients_) { gradients = gradients_; }

  // All phases of a short sequence, the rows kept in `memory`.
  void run(void* memory, double* grad_w, double* grad_u) {
    Row* rows = static_cast<Row*>(memory);
    for (int64_t c = 0; c < count; ++c) Base::find_max(c);
    Base::find_shift();
    for (int64_t c = 0; c < count; ++c) {
      Base::look_ahead(begin(c), Lanes<V>::count);
      const Sum<V> sum = weigh_and_sum(c, frame->shift, rows + c * kRows);
      chunks[c].forth.d = sum.d, chunks[c].centre = sum.n / sum.d;
    }
    for (int half = 0; half < kHalves; ++half) find_centre(half);
    for (int64_t c = 0; c < count; ++c) {
      chunks[c].centre = frame->centre;
      sum_keys(c, rows + c * kRows);
    }
    for (int half = 0; half < kHalves; ++half) Base::join_chunks(half);
    for (int64_t c = 0; c < count; ++c) {
      Base::look_ahead(begin(c), Lanes<V>::count);
      sum_gradients(c, rows + c * kRows);
    }
    join_gradients();
    for (int64_t c = 0; c < count; ++c) write_gradients(c, rows + c * kRows, grad_w, grad_u);
  }

  // The phases of a long sequence: each over all chunks before the next begins.
  void sum_keys(int64_t c) {
    Row rows[kRows];
    Base::find_max(c);
    const Sum<V> sum = weigh_and_sum(c, chunks[c].max, rows);
    chunks[c].forth.d = sum.d, chunks[c].centre = sum.n / sum.d;
    for (int half = 0; half < kHalves; ++half) {
      const Doubles centre = half_of(chunks[c].centre, half);
      put_half(centre == centre ? centre : Doubles{}, chunks[c].centre, half);
    }
    sum_keys(c, rows);
  }

  void join_keys() {
    Base::find_shift();
    for (int half = 0; half < kHalves; ++half) {
      Base::scale_chunks(half);
      find_centre(half);
      Base::join_chunks(half);
    }
  }

  void sum_gradients(int64_t c) {
    Row rows[kRows];
    Base::weigh(c, frame->shift, rows);
    sum_gradients(c, rows);
  }

  void join_gradients() {
    for (int half = 0; half < kHalves; ++half) {
      const Doubles skip = Base::skip(half);
      Sum<Doubles> forth = {}, back = {};
      for (int64_t c = 0; c < count; ++c) Base::pass_on(forth, skip, gradients[c].forth, Doubles{}, half);
      for (int64_t c = count - 1; c >= 0; --c) Base::pass_on(back, skip, gradients[c].back, Doubles{}, half);
    }
  }

  void write_gradients(int64_t c, double* grad_w, double* grad_u) {
    Row rows[kRows];
    Base::weigh(c, frame->shift, rows);
    walk(c, rows);
    write_gradients(c, rows, grad_w, grad_u);
  }

 private:
  // Weights of a chunk, and the sums of x v and x without decay.
  Sum<V> weigh_and_sum(int64_t c, V shift, Row* rows) const {
    Base::weigh(c, shift, rows);
    const Number* v = v_at(c);
    auto next = Base::v_next;
    Sum<V> sum = {};
    for (int64_t t = 0, end = rows_of(c); t < end; ++t, v += s.v_time) {
      next.fetch();
      sum = {sum.n + rows[t].x * widen_two(v), sum.d + rows[t].x};
    }
    return sum;
  }

  // A mean over the strip of the chunks' means; any weights would do that follow the keys'.
  void find_centre(int half) {
    Sum<Doubles> all = {};
    for (int64_t c = 0; c < count; ++c) {
      const Doubles d = half_of(chunks[c].forth.d, half), n = d * half_of(chunks[c].centre, half);
      all = {all.n + (d > 0 ? n : Doubles{}), all.d + d};
    }
    const Doubles mean = all.n / all.d;
    put_half(mean == mean ? mean : Doubles{}, frame->centre, half);
  }

  void sum_keys(int64_t c, Row* rows) {
    const Number* v = v_at(c);
    const V centre = chunks[c].centre, decay = this->decay;
    Sum<V> forth = {}, back = {};
    for (int64_t t = 0, end = rows_of(c); t < end; ++t, v += s.v_time) {
      const V x = rows[t].x, centred = widen_two(v) - centre, xv = x * centred;
      forth = sum_push(forth, decay, xv, x);
      back = {back.n + powers[t] * xv, back.d + powers[t] * x};
      if (Base::last_of_block(t)) forth = Base::settle(forth);
    }
    chunks[c].forth = forth, chunks[c].back = back;
  }

  // v, a, b and bonus of a chunk; returns its own sums of a and b.
  GradientChunk walk(int64_t c, Row* rows) const {
    Sum<V> later[kRows];
    const V boost = this->boost, centre = frame->centre, decay = this->decay;
    const Number* v = v_at(c);
    auto v_next = Base::v_next;
    Sum<V> sum = chunks[c].back;
    for (int64_t t = rows_of(c) - 1; t >= 0; --t) {
      later[t] = sum;
      rows[t].v = widen_two(v + t * s.v_time) - centre;
      sum = sum_push(sum, decay, rows[t].x * rows[t].v, rows[t].x);
      if (Base::first_of_block(t)) sum = Base::settle(sum);
    }
    const Number* grad_y = s.grad_y + begin(c) * s.grad_y_time;
    auto next = Base::grad_y_next;
    Sum<V> forth = {}, back = {};
    sum = chunks[c].forth;
    for (int64_t t = 0, end = rows_of(c); t < end; ++t, grad_y += s.grad_y_time) {
      next.fetch(), v_next.fetch();
      const V x = rows[t].x, v = rows[t].v, own = boost * x;
      const Output<V> out = sum_output(sum, later[t], own, v);
      const V a = widen_two(grad_y) * out.inverse, b = a * out.y;
      rows[t].a = a, rows[t].b = b, rows[t].bonus = own * a * out.off;
      sum = sum_push(sum, decay, x * v, x);
      forth = sum_push(forth, decay, a, b);
      back = {back.n + powers[t] * a, back.d + powers[t] * b};
      if (Base::last_of_block(t)) sum = Base::settle(sum), forth = Base::settle(forth);
    }
    return {forth, back};
  }

  void sum_gradients(int64_t c, Row* rows) { gradients[c] = walk(c, rows); }

  void write_gradients(int64_t c, const Row* rows, double* grad_w, double* grad_u) {
    struct {
      Sum<V> keys, gradients;
    } earlier[kRows];
    const V boost = this->boost, decay = this->decay;
    const int64_t end = rows_of(c);
    Number* grad_k = s.grad_k + begin(c) * s.out_time;
    Number* grad_v = s.grad_v + begin(c) * s.out_time;
    Sum<V> keys = chunks[c].forth, sum = gradients[c].forth;
    for (int64_t t = 0; t < end; ++t, grad_k += s.out_time, grad_v += s.out_time) {
      Base::fetch_to_write(grad_k), Base::fetch_to_write(grad_v);
      earlier[t].keys = keys, earlier[t].gradients = sum;
      keys = sum_push(keys, decay, rows[t].x * rows[t].v, rows[t].x);
      sum = sum_push(sum, decay, rows[t].a, rows[t].b);
      if (Base::last_of_block(t)) keys = Base::settle(keys), sum = Base::settle(sum);
    }
    V to_w = {}, to_u = {};
    keys = chunks[c].back, sum = gradients[c].back;
    for (int64_t t = end - 1; t >= 0; --t) {
      grad_k -= s.out_time, grad_v -= s.out_time;
      const V x = rows[t].x, v = rows[t].v, a = rows[t].a, bonus = rows[t].bonus;
      const V n = earlier[t].gradients.n + sum.n, d = earlier[t].gradients.d + sum.d;
      Base::write(x * (v * n - d) + bonus, grad_k);
      Base::write(x * (n + boost * a), grad_v);
      to_u += bonus;
      to_w += flux(earlier[t].keys, sum) + flux(keys, earlier[t].gradients);
      keys = sum_push(keys, decay, x * v, x);
      sum = sum_push(sum, decay, a, rows[t].b);
      if (Base::first_of_block(t)) keys = Base::settle(keys), sum = Base::settle(sum);
    }
    to_w = -(to_w * decay);
    for (int half = 0; half < kHalves; ++half) {
      double *w_at = grad_w + half * Base::kHalf, *u_at = grad_u + half * Base::kHalf;
      narrow(widen<Doubles>(w_at) + half_of(to_w, half), w_at);
      narrow(widen<Doubles>(u_at) + half_of(to_u, half), u_at);
    }
  }

  GradientChunk* gradients;
};

}  // namespace biwkv
