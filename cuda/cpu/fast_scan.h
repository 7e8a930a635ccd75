// Bi-WKV4 in float32, one strip at a time. All keys of a channel are shifted by one number, so every sum is a plain
// linear recurrence. Time is split into chunks. The sums within a chunk are float32 and relative to its largest key.
// They are joined across chunks in float64, so that errors grow with the length of a chunk, not of the sequence.
//
// Channels beyond the bound of shared/accumulators.h get wrong results here, which exact_scan.h overwrites.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../shared/accumulators.h"
#include "strip.h"
#include "vector.h"

namespace biwkv {

// The sums within a chunk. join() replaces them with the sums of all positions before (forth) and after it (back).
struct Chunk {
  Floats max, center;  // its largest key, and the weighted mean of its values
  Floats scale;        // converts the chunk's weights, e^(k - max), to the strip's
  Sum<Floats> forth, back, grad_forth, grad_back;
};

template <bool backward>
struct Row {
  Floats x, v;  // weight and value; the forward pass replaces the value with their product
};
template <>
struct Row<true> {
  Floats x, v, a, b, bonus;  // a = grad / D, b = a y, and the part of grad_k that goes through the own term
};

// The data that the phases of a strip share. Each thread reuses it for its next strip.
template <bool backward>
struct FastMemory {
  std::vector<Chunk> chunks;
  std::vector<Row<backward>> rows;
};

// The phases of one strip. Each phase finishes all chunks before the next phase begins.
template <class Number, bool backward>
class FastScan {
 public:
  FastScan(const Strip<Number>& strip, const float* w_, const float* u, FastMemory<backward>& m)
      : count((strip.length + kRows - 1) / kRows),
        s(strip),
        w(load(w_, s.lanes)),
        boost(exponential(load(u, s.lanes))),
        kept(s.length <= kKept) {
    round_decay();
    m.chunks.resize(std::max<size_t>(m.chunks.size(), count));
    m.rows.resize(std::max<size_t>(m.rows.size(), kept ? count * kRows : kRows));
    chunks = m.chunks.data(), rows = m.rows.data();
  }

  const int64_t count;  // number of chunks

  void sum_keys(int64_t c) {
    find_max(c);
    weigh(c);
    find_center(c);
    const Number* v = s.v + c * kRows * s.v_time;
    const auto* row = rows_at(c);
    const Floats center = chunks[c].center;
    Sums forth = {}, back = {};
    for (int64_t t = 0, last = rows_of(c) - 1; t <= last; ++t) {
      const Floats x = row[t].x, far_x = row[last - t].x;
      forth = sum_push(forth, decay[t], x * value(v + t * s.v_time, center), x);
      back = sum_push(back, decay[t], far_x * value(v + (last - t) * s.v_time, center), far_x);
    }
    chunks[c].forth = forth, chunks[c].back = back;
  }

  // The strip's weights are e^(k - shift). The shift is half of the whole decay below the largest key, which keeps the
  // sums near one.
  void join_keys() {
    Floats max = chunks[0].max;
    for (int64_t c = 1; c < count; ++c) max = larger(max, chunks[c].max);
    const Floats shift = max - w * (0.5f * s.length);
    Sums mean = {};
    for (int64_t c = 0; c < count; ++c) {
      const Floats scale = exponential(chunks[c].max - shift), d = chunks[c].forth.d * scale;
      chunks[c].scale = scale;
      mean = {mean.n + d * chunks[c].center, mean.d + d};
    }
    center = mean_of(mean);
    for (int64_t c = 0; c < count; ++c) {
      const Floats scale = chunks[c].scale, move = chunks[c].center - center;
      for (Sums* own : {&chunks[c].forth, &chunks[c].back}) *own = {(own->n + move * own->d) * scale, own->d * scale};
    }
    join(&Chunk::forth, &Chunk::back);
  }

  void write_output(int64_t c) {
    Sums later[kRows];  // own term and all later positions
    if (!kept) weigh(c);
    const int64_t end = rows_of(c);
    const Number* v = s.v + c * kRows * s.v_time;
    Number* y = s.y + c * kRows * s.out_time;
    auto* row = rows_at(c);
    const Floats scale = chunks[c].scale;
    Sums sum = chunks[c].back;
    for (int64_t t = end - 1; t >= 0; --t) {
      const Floats x = row[t].x * scale, xv = x * value(v + t * s.v_time, center);
      row[t].x = x, row[t].v = xv;
      later[t] = {sum.n + boost * xv, sum.d + boost * x};
      sum = sum_push(sum, decay[t], xv, x);
    }
    sum = chunks[c].forth;
    for (int64_t t = 0; t < end; ++t) {
      write((sum.n + later[t].n) / (sum.d + later[t].d), y + t * s.out_time);
      sum = sum_push(sum, decay[t], row[t].v, row[t].x);
    }
  }

  void sum_gradients(int64_t c) {
    if (!kept) weigh(c);
    fill_rows(c);
    const auto* row = rows_at(c);
    Sums forth = {}, back = {};
    for (int64_t t = 0, last = rows_of(c) - 1; t <= last; ++t) {
      forth = sum_push(forth, decay[t], row[t].a, row[t].b);
      back = sum_push(back, decay[t], row[last - t].a, row[last - t].b);
    }
    chunks[c].grad_forth = forth, chunks[c].grad_back = back;
  }

  void join_gradients() { join(&Chunk::grad_forth, &Chunk::grad_back); }

  void write_gradients(int64_t c, ParameterGradients& to) {
    Sums earlier_keys[kRows], earlier[kRows];
    if (!kept) weigh(c), fill_rows(c);
    const int64_t end = rows_of(c);
    const auto* row = rows_at(c);
    Number *grad_k = s.grad_k + c * kRows * s.out_time, *grad_v = s.grad_v + c * kRows * s.out_time;
    Sums keys = chunks[c].forth, sum = chunks[c].grad_forth;
    for (int64_t t = 0; t < end; ++t) {
      earlier_keys[t] = keys, earlier[t] = sum;
      keys = sum_push(keys, decay[t], row[t].x * row[t].v, row[t].x);
      sum = sum_push(sum, decay[t], row[t].a, row[t].b);
    }
    Floats to_w = {}, to_u = {};
    keys = chunks[c].back, sum = chunks[c].grad_back;
    for (int64_t t = end - 1; t >= 0; --t) {
      const Floats x = row[t].x, v = row[t].v, a = row[t].a;
      const Floats n = earlier[t].n + sum.n, d = earlier[t].d + sum.d;
      write(x * (v * n - d) + row[t].bonus, grad_k + t * s.out_time);
      write(x * (n + boost * a), grad_v + t * s.out_time);
      to_u += row[t].bonus;
      to_w += flux(earlier_keys[t], sum) + flux(keys, earlier[t]);
      keys = sum_push(keys, decay[t], x * v, x);
      sum = sum_push(sum, decay[t], a, row[t].b);
    }
    for (int i = 0; i < kLanes; ++i) to.w[i] -= to_w[i] * decay[0][i], to.u[i] += to_u[i];
  }

 private:
  using Sums = Sum<Floats>;

  static constexpr int64_t kRows = 32;    // positions of a chunk
  static constexpr int64_t kKept = 2048;  // longest sequence whose rows are kept, in the caches, between phases

  int64_t rows_of(int64_t c) const { return std::min(kRows, s.length - c * kRows); }
  Row<backward>* rows_at(int64_t c) const { return rows + (kept ? c * kRows : 0); }

  Floats value(const Number* v, Floats from) const {
    const Floats x = load(v, s.lanes);
    if constexpr (backward) return x - from;
    return x;
  }
  void write(Floats x, Number* p) const { s.past_caches ? narrow_past_caches(x, p) : store(x, p, s.lanes); }
  // Prefetches a later row into the second-level cache, because the first has no room.
  static void fetch(const Number* p) { __builtin_prefetch(p, 0, 2); }

  // With the same rounded decay in every row, errors would add up. Each row's decay corrects those of earlier rows.
  void round_decay() {
    Floats near, rest, excess = {};  // near + rest is the decay; excess is the relative error to correct
    for (int i = 0; i < kLanes; ++i) {
      const double exact = std::exp(-static_cast<double>(w[i]));
      near[i] = static_cast<float>(exact), rest[i] = static_cast<float>(exact - near[i]);
      skip[i] = exact;
    }
    for (int64_t rows = 1; rows < kRows; rows *= 2) {
      for (int i = 0; i < kLanes; ++i) skip[i] *= skip[i];
    }
    const Floats inverse = 1.0f / near;
    for (int64_t t = 0; t < kRows; ++t) {
      decay[t] = near + (rest - near * excess);
      excess += (decay[t] - near - rest) * inverse;
    }
  }

  void find_max(int64_t c) {
    const Number* k = s.k + c * kRows * s.k_time;
    Floats max = Floats{} - 3.40282347e38f;  // not -inf, so that a chunk with only keys of -inf gives zeros, not NaN
    for (int64_t t = 0, end = rows_of(c); t < end; ++t) max = larger(max, load(k + t * s.k_time, s.lanes));
    chunks[c].max = max;
  }

  // In the backward pass, values are relative to a weighted mean. Otherwise v - y would cancel if one key dominates.
  void find_center(int64_t c) {
    const Number* v = s.v + c * kRows * s.v_time;
    const auto* row = rows_at(c);
    Sums mean = {};
    for (int64_t t = 0, end = rows_of(c); backward && t < end; ++t) {
      mean = {mean.n + row[t].x * load(v + t * s.v_time, s.lanes), mean.d + row[t].x};
    }
    chunks[c].center = mean_of(mean);
  }
  static Floats mean_of(const Sums& sums) {
    const Floats mean = sums.n / sums.d;
    return mean == mean ? mean : Floats{};
  }

  // The weights of a chunk, e^(k - max).
  void weigh(int64_t c) {
    const int64_t end = rows_of(c), begin = c * kRows, next = begin + kRows;
    auto* row = rows_at(c);
    const Floats max = chunks[c].max;
#pragma GCC unroll 4
    for (int64_t t = 0; t < end; ++t) {
      fetch(s.k + (next + t) * s.k_time), fetch(s.v + (next + t) * s.v_time);
      row[t].x = exponential(load(s.k + (begin + t) * s.k_time, s.lanes) - max);
    }
  }

  void join(Sums Chunk::*forth, Sums Chunk::*back) {
    double n[kLanes] = {}, d[kLanes] = {};
    for (int64_t c = 0; c < count; ++c) pass_on(chunks[c].*forth, n, d);
    std::fill_n(n, kLanes, 0.0), std::fill_n(d, kLanes, 0.0);
    for (int64_t c = count - 1; c >= 0; --c) pass_on(chunks[c].*back, n, d);
  }

  // Replaces the sums within a chunk with those of all chunks before it, n and d, and adds the former to n and d.
  void pass_on(Sums& own, double* n, double* d) const {
    for (int i = 0; i < kLanes; ++i) {
      const double own_n = own.n[i], own_d = own.d[i];
      own.n[i] = n[i], own.d[i] = d[i];
      n[i] = n[i] * skip[i] + own_n, d[i] = d[i] * skip[i] + own_d;
    }
  }

  // Converts the weights of a chunk to the strip's scale, and fills the chunk's rows.
  void fill_rows(int64_t c) {
    Sums later[kRows];
    const int64_t end = rows_of(c);
    const Number *v = s.v + c * kRows * s.v_time, *grad_y = s.grad_y + c * kRows * s.grad_y_time;
    auto* row = rows_at(c);
    const Floats scale = chunks[c].scale;
    Sums sum = chunks[c].back;
    for (int64_t t = end - 1; t >= 0; --t) {
      later[t] = sum;
      row[t].x *= scale, row[t].v = value(v + t * s.v_time, center);
      sum = sum_push(sum, decay[t], row[t].x * row[t].v, row[t].x);
    }
    sum = chunks[c].forth;
    for (int64_t t = 0; t < end; ++t) {
      fetch(grad_y + (kRows + t) * s.grad_y_time);
      const Floats x = row[t].x, own = boost * x;
      const Output<Floats> out = sum_output(sum, later[t], own, row[t].v);
      const Floats a = load(grad_y + t * s.grad_y_time, s.lanes) * out.inverse;
      row[t].a = a, row[t].b = a * out.y, row[t].bonus = own * a * out.off;
      sum = sum_push(sum, decay[t], x * row[t].v, x);
    }
  }

  const Strip<Number> s;
  const Floats w, boost;
  const bool kept;
  Floats decay[kRows];  // for each row of a chunk
  double skip[kLanes];  // the decay over a chunk
  Floats center;
  Chunk* chunks;
  Row<backward>* rows;
};

}  // namespace biwkv
