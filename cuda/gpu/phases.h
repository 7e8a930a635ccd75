// Bi-WKV4 on a GPU. A thread handles one channel of one chunk of time. Neighboring threads handle neighboring channels.
// Threads share only global memory, and a phase ends before the next begins. So the tests can run these functions on a
// CPU, one thread after another (tests/modules/biwkv4_emulation.cpp).
//
// The phases are those of the CPU: the sums within each chunk (sum_keys), the channel's shift and center (find_frame),
// the sums before and after each chunk (join_keys), and a second pass over each chunk with these sums. They run with
// OneShift as `Weights` for all channels, then with RunningMaximum for channels beyond the bound, whose results they
// overwrite. So the host need not know which channels are beyond the bound.
#pragma once

#include <cstdint>

#include "../shared/accumulators.h"
#include "cell.h"
#include "device.h"

namespace biwkv {

// A block of rows in the backward pass, in registers.
template <class Weights>
struct Block {
  using Real = typename Weights::Real;
  Real x[kBlock];
  float v[kBlock];
  typename Weights::Gradient gradient[kBlock];
  Real grad_k[kBlock], grad_v[kBlock];    // without the contribution of later positions
  typename Weights::State keys[kBlock];   // sums over the keys before each row
};

// Fills a block. `before` and `earlier` are the sums over keys and over gradients at the start of the block; they are
// updated to its end. `after` is the sum over the keys after its end. Adds the gradient of u of this block; of the
// gradient of w it adds only the crossings with earlier gradients.
template <class Number, class Weights, class State = typename Weights::State, class Real = typename Weights::Real>
BIWKV_DEVICE void walk(const Cell<Number, Weights, true>& cell, int block, Block<Weights>& rows, State& before,
                       State after, State& earlier, Real& to_w, Real& to_u) {
  const Weights& weights = cell.weights;
  cell.load(block, rows.x, rows.v);
#pragma unroll Weights::kUnrollRows
  for (int i = kBlock - 1; i >= 0; --i) {
    rows.keys[i] = after;
    after = weights.push(after, rows.x[i], static_cast<Real>(rows.v[i]));
  }
#pragma unroll Weights::kUnrollRows
  for (int i = 0; i < kBlock; ++i) {
    const bool inside = block * kBlock + i < cell.rows;
    const Real x = rows.x[i], v = rows.v[i], grad = inside ? cell.grad(block * kBlock + i) : 0.0f;
    const auto out = weights.output(before, rows.keys[i], x, v);
    rows.gradient[i] = inside ? weights.gradient(out, grad) : Weights::no_gradient();
    const Real own = inside ? weights.own_part(out, rows.gradient[i], grad) : Real(0);
    const Real bonus = inside ? own * out.off : Real(0);
    to_u += bonus;
    to_w += weights.crossing(rows.keys[i], earlier);
    rows.grad_k[i] = weights.to_key(x, v, earlier) + bonus, rows.grad_v[i] = weights.to_value(x, earlier) + own;
    rows.keys[i] = before;
    if (!inside) continue;  // repeated decay beyond the sequence could give infinity times zero
    before = weights.push(before, x, v);
    earlier = weights.push(earlier, rows.gradient[i]);
  }
  before = weights.settle(before), earlier = weights.settle(earlier);
}

// ---- the phases, one call per thread ----------------------------------------------------------------------------

template <class Number, class Weights, bool backward>
BIWKV_DEVICE void sum_keys(const Tensors<Number>& all, int64_t b, int64_t chunk, int64_t channel) {
  Cell<Number, Weights, backward> cell(all, b, chunk, channel);
  float max = -3.40282347e38f;  // not -inf, so that a chunk with only keys of -inf gives zeros, not NaN
#pragma unroll 8
  for (int row = 0; row < cell.rows; ++row) max = larger(max, cell.k(row));
  cell.field(kMax) = cell.weights.shift = max;
  float center = 0.0f;
  if (backward && Weights::kCentered) {
    Sum<float> mean = {0.0f, 0.0f};
#pragma unroll 8
    for (int row = 0; row < cell.rows; ++row) {
      const float x = cell.weights.weight(cell.k(row));
      mean = {mean.n + x * cell.v(row), mean.d + x};
    }
    center = mean.n / mean.d;
    center = center == center ? center : 0.0f;
    cell.field(kCenter) = center;
  }
  auto forth = Weights::nothing(), back = forth;
  auto age = Weights::near();
#pragma unroll Weights::kUnrollRows
  for (int row = 0; row < cell.rows; ++row) {
    const auto x = cell.weights.weight(cell.k(row));
    const typename Weights::Real v = cell.v(row) - center;
    forth = cell.weights.push(forth, x, v);
    back = cell.weights.add(back, age, x, v);
    age = cell.weights.farther(age);
    if (row % kBlock == kBlock - 1) forth = cell.weights.settle(forth), age = cell.weights.settle(age);
  }
  cell.put(kForth, forth);
  cell.put(kBack, back);
}

// Computes the channel's shift and center from the maxima and centers of its chunks.
template <class Number, class Weights, bool backward>
BIWKV_DEVICE void find_frame(const Tensors<Number>& all, int64_t b, int64_t, int64_t channel) {
  using Chunk = Cell<Number, Weights, backward>;
  float max = -3.40282347e38f;
#pragma unroll 8
  for (int64_t c = 0; c < all.chunks; ++c) max = larger(max, Chunk(all, b, c, channel).field(kMax));
  const Chunk first(all, b, 0, channel);
  first.frame(0) = Weights::shift_of(max, all.w[channel] * all.length);
  if (!backward || !Weights::kCentered) return;
  double n = 0, d = 0;
#pragma unroll 4
  for (int64_t c = 0; c < all.chunks; ++c) {
    const Chunk cell(all, b, c, channel);
    const double weight = cell.state(kForth).d * exponential(static_cast<double>(cell.field(kMax)) - max);
    n += weight * cell.field(kCenter), d += weight;
  }
  const float center = static_cast<float>(n / d);
  first.frame(1) = center == center ? center : 0.0f;
}

// Replaces the state of each chunk with that of all positions before (forth) or after it (back), in float64. `own`
// reads a chunk's state. The loop reads several chunks before it writes them, so that reads do not wait for writes.
template <class Number, class Weights, bool backward, class Own>
BIWKV_DEVICE void join(const Tensors<Number>& all, int64_t b, int64_t channel, bool back, int which, const Own& own) {
  using Chunk = Cell<Number, Weights, backward>;
  const auto chunk = [&](int64_t i) { return Chunk(all, b, back ? all.chunks - 1 - i : i, channel); };
  const double skip = Weights::skip(all.w[channel], kChunk);
  auto sum = Weights::none_joined();
  for (int64_t i = 0; i < all.chunks; i += kBlock) {
    typename Weights::Joined states[kBlock];
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      if (i + j < all.chunks) states[j] = own(chunk(i + j), which);
    }
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      if (i + j >= all.chunks) break;
      chunk(i + j).put(which, sum);
      sum = Weights::join(sum, skip, states[j]);
    }
  }
}

template <class Number, class Weights, bool backward>
BIWKV_DEVICE void join_keys(const Tensors<Number>& all, int64_t b, int64_t side, int64_t channel) {
  join<Number, Weights, backward>(all, b, channel, side != 0, side ? kBack : kForth, [](const auto& cell, int which) {
    const double by = static_cast<double>(cell.field(kMax)) - cell.weights.shift;
    const double uncenter = backward && Weights::kCentered ? static_cast<double>(cell.field(kCenter)) - cell.center : 0;
    return Weights::moved(Weights::widen(cell.state(which)), by, uncenter);
  });
}

template <class Number, class Weights>
BIWKV_DEVICE void join_gradients(const Tensors<Number>& all, int64_t b, int64_t side, int64_t channel) {
  join<Number, Weights, true>(all, b, channel, side != 0, side ? kGradBack : kGradForth,
                              [](const auto& cell, int which) { return Weights::widen(cell.state(which)); });
}

template <class Number, class Weights>
BIWKV_DEVICE void write_output(const Tensors<Number>& all, int64_t b, int64_t chunk, int64_t channel) {
  using Real = typename Weights::Real;
  const Cell<Number, Weights, false> cell(all, b, chunk, channel);
  typename Weights::State after[kBlocks], before = cell.state(kForth);
  cell.sums_after(after);
#pragma unroll Weights::kUnrollBlocks
  for (int block = 0; block < kBlocks; ++block) {
    Real x[kBlock];
    float v[kBlock];
    typename Weights::State later[kBlock], sum = after[block];
    cell.load(block, x, v);
#pragma unroll Weights::kUnrollRows
    for (int i = kBlock - 1; i >= 0; --i) {
      later[i] = sum;
      sum = cell.weights.push(sum, x[i], static_cast<Real>(v[i]));
    }
#pragma unroll Weights::kUnrollRows
    for (int i = 0; i < kBlock; ++i) {
      cell.write(all.y, block * kBlock + i, cell.weights.output(before, later[i], x[i], static_cast<Real>(v[i])).y);
      before = cell.weights.push(before, x[i], static_cast<Real>(v[i]));
    }
    before = cell.weights.settle(before);
  }
}

template <class Number, class Weights>
BIWKV_DEVICE void sum_gradients(const Tensors<Number>& all, int64_t b, int64_t chunk, int64_t channel) {
  using Real = typename Weights::Real;
  const Cell<Number, Weights, true> cell(all, b, chunk, channel);
  typename Weights::State after[kBlocks], before = cell.state(kForth);
  auto forth = Weights::nothing(), back = forth;
  Real age = Weights::near(), to_w = 0, to_u = 0;
  cell.sums_after(after);
#pragma unroll Weights::kUnrollBlocks
  for (int block = 0; block < kBlocks; ++block) {
    Block<Weights> rows;
    walk(cell, block, rows, before, after[block], forth, to_w, to_u);
#pragma unroll Weights::kUnrollRows
    for (int i = 0; i < kBlock; ++i) {
      if (block * kBlock + i >= cell.rows) continue;
      back = cell.weights.add(back, age, rows.gradient[i]);
      age = cell.weights.farther(age);
    }
    age = cell.weights.settle(age);
  }
  cell.put(kGradForth, forth);
  cell.put(kGradBack, back);
}

template <class Number, class Weights>
BIWKV_DEVICE void write_gradients(const Tensors<Number>& all, int64_t b, int64_t chunk, int64_t channel) {
  using Real = typename Weights::Real;
  const Cell<Number, Weights, true> cell(all, b, chunk, channel);
  typename Weights::State after[kBlocks], before[kBlocks], earlier[kBlocks];  // of each block; earlier: over gradients
  Real to_w = 0, to_u = 0;
  cell.sums_after(after);
  before[0] = cell.state(kForth), earlier[0] = cell.state(kGradForth);
#pragma unroll Weights::kUnrollBlocks
  for (int block = 0; block + 1 < kBlocks; ++block) {
    Block<Weights> rows;
    Real unused_w = 0, unused_u = 0;
    before[block + 1] = before[block], earlier[block + 1] = earlier[block];
    walk(cell, block, rows, before[block + 1], after[block], earlier[block + 1], unused_w, unused_u);
  }
  auto later = cell.state(kGradBack);
#pragma unroll Weights::kUnrollBlocks
  for (int block = kBlocks - 1; block >= 0; --block) {
    Block<Weights> rows;
    walk(cell, block, rows, before[block], after[block], earlier[block], to_w, to_u);
#pragma unroll Weights::kUnrollRows
    for (int i = kBlock - 1; i >= 0; --i) {
      const Real x = rows.x[i], v = rows.v[i];
      cell.write(all.grad_k, block * kBlock + i, rows.grad_k[i] + cell.weights.to_key(x, v, later));
      cell.write(all.grad_v, block * kBlock + i, rows.grad_v[i] + cell.weights.to_value(x, later));
      to_w += cell.weights.crossing(rows.keys[i], later);
      later = cell.weights.push(later, rows.gradient[i]);
    }
    later = cell.weights.settle(later);
  }
  cell.field(kPartW) = static_cast<float>(cell.weights.to_w(to_w));
  cell.field(kPartU) = static_cast<float>(to_u);
}

// Runs all phases but sum_parameters. each.template run<phase>(rows) calls a phase for every channel and for as many
// rows (chunks or sides).
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class Number, class Weights, bool backward, class Each>
BIWKV_SHARED void run_phases(const Each& each, int64_t chunks) {
  each.template run<sum_keys<Number, Weights, backward>>(chunks);
  each.template run<find_frame<Number, Weights, backward>>(1);
  each.template run<join_keys<Number, Weights, backward>>(2);
  if constexpr (backward) {
    each.template run<sum_gradients<Number, Weights>>(chunks);
    each.template run<join_gradients<Number, Weights>>(2);
    each.template run<write_gradients<Number, Weights>>(chunks);
  } else {
    each.template run<write_output<Number, Weights>>(chunks);
  }
}

// Sums the gradients of one channel's w and u over the batch and the chunks, in a fixed order.
template <class Number>
BIWKV_DEVICE void sum_parameters(const Tensors<Number>& all, int64_t, int64_t, int64_t channel) {
  double w = 0, u = 0;
  for (int64_t b = 0; b < all.batch; ++b) {
#pragma unroll 8
    for (int64_t c = 0; c < all.chunks; ++c) {
      const int64_t at = (b * all.chunks + c) * all.channels + channel, field = all.batch * all.chunks * all.channels;
      w += all.fields[kPartW * field + at], u += all.fields[kPartU * field + at];
    }
  }
  all.grad_w[channel] = static_cast<float>(w), all.grad_u[channel] = static_cast<float>(u);
}

}  // namespace biwkv
