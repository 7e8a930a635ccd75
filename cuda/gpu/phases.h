// Bi-WKV4 on a GPU. A block of threads has 32 neighboring channels of one tile of a sequence. Up to kWhole rows are one
// tile. Each warp of the block has one run of the tile's rows, and reads it in blocks of kBlock rows.
//
// The phases are those of the CPU: the sums of each run (sum_keys), the frame of all sums (find_frame), the sums before
// and after each run (join_warps), and a second pass over each run with these sums. schedule.h has their order.
#pragma once

#include <cstdint>

#include "../shared/accumulators.h"
#include "device.h"
#include "thread.h"
#include "weights.h"

namespace biwkv {

// The mean, or 0 if there are no weights.
BIWKV_DEVICE float mean_of(const Sum<float>& sum) {
  const float mean = sum.n * reciprocal(sum.d);
  return mean == mean ? mean : 0.0f;
}

// A block of rows, in registers.
template <class T>
struct Rows {
  typename T::Real x[kBlock];
  float v[kBlock];
  typename T::State keys[kBlock];  // sums over the keys after each row
};

// Calls use(i, rows, output) for each row of a block. `before` is the sum over the keys before the block, and is moved
// to its end. `after` is the sum over the keys after the block, and is moved to its start.
template <class T, class State, class Use>
BIWKV_DEVICE void walk(const T& t, int block, Rows<T>& rows, State& before, State& after, const Use& use) {
  float keys[kBlock];
  t.load(block, keys, rows.v);
#pragma unroll T::Weights::kUnroll
  for (int i = kBlock - 1; i >= 0; --i) {
    rows.x[i] = t.weights.weight(keys[i], t.frame.base);
    if (T::kCenters) rows.v[i] -= t.frame.center;
    rows.keys[i] = after;
    after = t.weights.push(after, rows.x[i], rows.v[i]);
  }
#pragma unroll T::Weights::kUnroll
  for (int i = 0; i < kBlock; ++i) {
    use(i, rows, t.weights.output(before, rows.keys[i], rows.x[i], rows.v[i]));
    before = t.weights.push(before, rows.x[i], rows.v[i]);
  }
  before = t.weights.settle(before), after = t.weights.settle(after);
}

// ---- sums over keys ---------------------------------------------------------------------------------------------

// Sums a run from its end, relative to the largest key and the mean value so far. Without a center, v - y would cancel
// if one key dominates. Notes for each block the sum over later ones.
template <class T>
BIWKV_DEVICE void sum_keys(T& t) {
  using Weights = typename T::Weights;
  for (int block = t.blocks() - 1; block >= 0; --block) {
    float keys[kBlock], v[kBlock];
    t.load(block, keys, v);
    const Frame old = t.own;
    Weights::put(t.back, t.note(0, block), Weights::kLanesAtOnce);
    *t.note(Weights::kWidth, block) = old.base;
    if (T::kCenters) *t.note(Weights::kWidth + 1, block) = old.center;
#pragma unroll Weights::kUnroll
    for (int i = 0; i < kBlock; ++i) t.own.base = keys[i] > t.own.base ? keys[i] : t.own.base;
    typename T::Real x[kBlock];
#pragma unroll Weights::kUnroll
    for (int i = 0; i < kBlock; ++i) x[i] = Weights::weight(keys[i], t.own.base);
    if constexpr (T::kCenters) {
      Sum<float> mean = {0.0f, t.own.weight * exponential(old.base - t.own.base)};
#pragma unroll
      for (int i = 0; i < kBlock; ++i) mean = {mean.n + x[i] * (v[i] - old.center), mean.d + x[i]};
      t.own.center += mean_of(mean), t.own.weight = mean.d;
#pragma unroll
      for (int i = 0; i < kBlock; ++i) v[i] -= t.own.center;
    }
    auto sum = Weights::nothing();
#pragma unroll Weights::kUnroll
    for (int i = 0; i < kBlock; ++i) sum = t.weights.push(sum, x[i], v[i]);
    sum = t.weights.aged(sum, t.all.run - (block + 1) * kBlock);
    t.forth = Weights::plus(Weights::moved(t.forth, old, t.own), sum);
    t.back = Weights::moved(t.back, old, t.own);
#pragma unroll Weights::kUnroll
    for (int i = kBlock - 1; i >= 0; --i) t.back = t.weights.push(t.back, x[i], v[i]);
    t.back = t.weights.settle(t.back);
  }
}

// The sum over all keys after a block, from the note of sum_keys.
template <class T>
BIWKV_DEVICE typename T::State after_block(const T& t, int block) {
  using Weights = typename T::Weights;
  Frame noted = {static_cast<float>(*t.note(Weights::kWidth, block)), 0.0f};
  if (T::kCenters) noted.center = *t.note(Weights::kWidth + 1, block);
  return Weights::plus(t.weights.aged(t.after, t.all.run - (block + 1) * kBlock),
                       Weights::moved(Weights::get(t.note(0, block), Weights::kLanesAtOnce), noted, t.frame));
}

template <class Store>
BIWKV_DEVICE void put_peak(const Peak& peak, Store* to, int64_t stride) {
  to[0] = peak.base, to[stride] = peak.center, to[2 * stride] = peak.weight;
}
template <class Store>
BIWKV_DEVICE Peak get_peak(const Store* from, int64_t stride) {
  return {{static_cast<float>(from[0]), static_cast<float>(from[stride])}, static_cast<float>(from[2 * stride])};
}

// Joins the peaks from `begin` up to `end`, which at(i) gives.
template <class T, class At>
BIWKV_DEVICE Peak join_peaks(int64_t begin, int64_t end, const At& at) {
  Peak top = T::no_peak();
#pragma unroll 4
  for (int64_t i = begin; i < end; ++i) top.base = at(i).base > top.base ? at(i).base : top.base;
  Sum<float> mean = {0.0f, 0.0f};
#pragma unroll 4
  for (int64_t i = begin; T::kCenters && i < end; ++i) {
    const Peak peak = at(i);
    const float weight = peak.weight * exponential(peak.base - top.base);
    mean = {mean.n + weight * peak.center, mean.d + weight};
  }
  return {{top.base, mean_of(mean)}, mean.d};
}

// Finds the frame of all sums from the peaks on the board.
template <class T>
BIWKV_DEVICE void find_frame(T& t) {
  t.top = join_peaks<T>(0, t.all.warps, [&](int64_t of) { return get_peak(t.slot(kPeak, of), T::kSlots); });
  t.frame = t.frame_of(t.top);
}

template <class T, class State>
BIWKV_DEVICE void put_sums(const T& t, const State& forth, const State& back) {
  T::Weights::put(forth, t.slot(kSums, t.warp), T::kSlots);
  T::Weights::put(back, t.slot(kSums + T::Weights::kWidth, t.warp), T::kSlots);
}

// Adds to `before` the sums on the board of warps before `end`, and to `after` those of warps after `begin`. A warp's
// sums are `rows` from the next warp's.
template <class T, class State>
BIWKV_DEVICE void join_warps(const T& t, int end, int begin, int rows, State& before, State& after) {
  using Weights = typename T::Weights;
#pragma unroll 4
  for (int of = 0; of < end; ++of) {
    before = Weights::plus(t.weights.aged(before, rows), Weights::get(t.slot(kSums, of), T::kSlots));
  }
#pragma unroll 4
  for (int of = t.all.warps - 1; of > begin; --of) {
    after = Weights::plus(t.weights.aged(after, rows), Weights::get(t.slot(kSums + Weights::kWidth, of), T::kSlots));
  }
}

template <class T>
BIWKV_DEVICE void write_output(T& t) {
  for (int block = 0; block < t.blocks(); ++block) {
    Rows<T> rows;
    auto after = after_block(t, block);
    int64_t at = t.place(block * kBlock);
    walk(t, block, rows, t.before, after, [&](int i, auto&, const auto& out) {
      if (block * kBlock + i < t.rows) t.write(t.all.y, at, out.y);
      at += t.all.channels;
    });
  }
}

// ---- gradients --------------------------------------------------------------------------------------------------

// Sums a run's gradients. Notes for each block the sums over earlier keys, and over earlier gradients of the run.
template <class T>
BIWKV_DEVICE void sum_gradients(T& t) {
  using Weights = typename T::Weights;
  auto keys = t.before;
  t.forth = t.back = Weights::nothing();
  for (int block = 0; block < t.blocks(); ++block) {
    Rows<T> rows;
    typename T::State gradient[kBlock];
    auto after = after_block(t, block);
    Weights::put(keys, t.note(0, block), Weights::kLanesAtOnce);
    Weights::put(t.forth, t.note(Weights::kWidth, block), Weights::kLanesAtOnce);
    walk(t, block, rows, keys, after, [&](int i, auto&, const auto& out) {
      const bool inside = block * kBlock + i < t.rows;  // the weight of a row beyond may be 0 / 0
      gradient[i] = inside ? t.weights.gradient(out, t.grad(block * kBlock + i)) : Weights::nothing();
      t.forth = t.weights.push(t.forth, gradient[i]);
    });
    t.forth = t.weights.settle(t.forth);
    auto sum = Weights::nothing();
#pragma unroll Weights::kUnroll
    for (int i = kBlock - 1; i >= 0; --i) sum = t.weights.push(sum, gradient[i]);
    t.back = Weights::plus(t.back, t.weights.aged(sum, block * kBlock));
  }
}

template <class T>
BIWKV_DEVICE void write_gradients(T& t) {
  using Weights = typename T::Weights;
  using Real = typename T::Real;
  for (int block = t.blocks() - 1; block >= 0; --block) {
    Rows<T> rows;
    typename T::State gradient[kBlock];
    Real grad_k[kBlock], grad_v[kBlock];  // without what comes from later rows
    auto keys = Weights::get(t.note(0, block), Weights::kLanesAtOnce);
    auto earlier = Weights::plus(t.weights.aged(t.earlier, block * kBlock),
                                 Weights::get(t.note(Weights::kWidth, block), Weights::kLanesAtOnce));
    walk(t, block, rows, keys, t.after, [&](int i, auto& row, const auto& out) {
      const bool inside = block * kBlock + i < t.rows;
      const float grad = t.grad(block * kBlock + i);
      const Real x = row.x[i], v = row.v[i];
      gradient[i] = inside ? t.weights.gradient(out, grad) : Weights::nothing();
      const Real own = inside ? t.weights.own_part(out, gradient[i], grad) : Real(0);
      const Real bonus = inside ? own * out.off : Real(0);
      t.to_u += bonus;
      t.to_w += t.weights.crossing(row.keys[i], earlier);
      grad_k[i] = t.weights.to_key(x, v, earlier) + bonus, grad_v[i] = t.weights.to_value(x, earlier) + own;
      row.keys[i] = keys;  // from here on the sum over the keys before the row
      earlier = t.weights.push(earlier, gradient[i]);
    });
    int64_t at = t.place(block * kBlock + kBlock);
#pragma unroll Weights::kUnroll
    for (int i = kBlock - 1; i >= 0; --i) {
      const Real x = rows.x[i], v = rows.v[i];
      at -= t.all.channels;
      if (block * kBlock + i < t.rows) {
        t.write(t.all.grad_k, at, grad_k[i] + t.weights.to_key(x, v, t.later));
        t.write(t.all.grad_v, at, grad_v[i] + t.weights.to_value(x, t.later));
      }
      t.to_w += t.weights.crossing(rows.keys[i], t.later);
      t.later = t.weights.push(t.later, gradient[i]);
    }
    t.later = t.weights.settle(t.later);
  }
}

}  // namespace biwkv
