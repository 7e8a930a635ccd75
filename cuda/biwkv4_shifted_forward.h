// The forward pass of one strip under one shift (biwkv4_shifted.h).
#pragma once

#include "biwkv4_shifted.h"

namespace biwkv {

template <class Number>
class ShiftedForward : public ShiftedScan<Number> {
  using Base = ShiftedScan<Number>;
  using Base::boost, Base::chunks, Base::count, Base::decay, Base::frame, Base::powers, Base::rows_of,
      Base::s, Base::v_at;

 public:
  using V = Wide;
  struct Row {
    V x;
  };

  // Memory that a strip which keeps its weights needs.
  static int64_t kept_bytes(int64_t length) { return chunks_of(length) * kRows * sizeof(Row); }

  // All phases of a short sequence, the weights kept in `memory`.
  void run(void* memory) {
    Row* rows = static_cast<Row*>(memory);
    for (int64_t c = 0; c < count; ++c) Base::find_max(c);
    Base::find_shift();
    for (int64_t c = 0; c < count; ++c) {
      Base::look_ahead(c * kRows, Lanes<V>::count);
      sum_keys(c, frame->shift, rows + c * kRows);
    }
    frame->centre = V{};
    for (int half = 0; half < Base::kHalves; ++half) Base::join_chunks(half);
    for (int64_t c = 0; c < count; ++c) write_output(c, rows + c * kRows);
  }

  // The phases of a long sequence: each over all chunks before the next begins.
  void sum_keys(int64_t c) {
    Row rows[kRows];
    Base::find_max(c);
    sum_keys(c, chunks[c].max, rows);
  }

  void join_keys() {
    Base::find_shift();
    frame->centre = V{};
    for (int half = 0; half < Base::kHalves; ++half) Base::scale_chunks(half), Base::join_chunks(half);
  }

  void write_output(int64_t c) {
    Row rows[kRows];
    Base::weigh(c, frame->shift, rows);
    write_output(c, rows);
  }

 private:
  void sum_keys(int64_t c, V shift, Row* rows) {
    Base::weigh(c, shift, rows);
    const Number* v = v_at(c);
    auto next = Base::v_next;
    const V decay = this->decay;
    Sum<V> forth = {}, back = {};
    for (int64_t t = 0, end = rows_of(c); t < end; ++t, v += s.v_time) {
      next.fetch();
      const V x = rows[t].x, xv = x * widen_two(v);
      forth = sum_push(forth, decay, xv, x);
      back = {back.n + powers[t] * xv, back.d + powers[t] * x};
      if (Base::last_of_block(t)) forth = Base::settle(forth);
    }
    chunks[c].forth = forth, chunks[c].back = back, chunks[c].centre = V{};
  }

  void write_output(int64_t c, Row* rows) {
    V values[kRows];
    Sum<V> later[kRows];  // the own term and all that comes after
    const V boost = this->boost, decay = this->decay;
    const int64_t end = rows_of(c), out_time = s.out_time;
    Number* y = s.y + c * kRows * out_time;
    const Number* v = v_at(c);
    auto next = Base::v_next;
    Sum<V> sum = chunks[c].back;
    for (int64_t t = end - 1; t >= 0; --t) {
      Base::fetch_to_write(y + t * out_time);
      const V x = rows[t].x, xv = x * widen_two(v + t * s.v_time);
      values[t] = xv;
      later[t] = {sum.n + boost * xv, sum.d + boost * x};
      sum = sum_push(sum, decay, xv, x);
      if (Base::first_of_block(t)) sum = Base::settle(sum);
    }
    sum = chunks[c].forth;
    for (int64_t t = 0; t < end; ++t, y += out_time) {
      next.fetch();
      Base::write((sum.n + later[t].n) * reciprocal(sum.d + later[t].d), y);
      sum = sum_push(sum, decay, values[t], rows[t].x);
      if (Base::last_of_block(t)) sum = Base::settle(sum);
    }
  }
};

}  // namespace biwkv
