// The data of a GPU thread (phases.h): the tensors, the workspace through which phases pass numbers to one another, and
// the thread's cell, which is one channel of one chunk of time.
#pragma once

#include <cstdint>

#include "../shared/accumulators.h"
#include "device.h"
#include "weights.h"

namespace biwkv {

constexpr int kChunk = 64, kBlocks = kChunk / kBlock;  // rows and blocks of a chunk

inline int64_t chunks_of(int64_t length) { return (length + kChunk - 1) / kChunk; }

template <class Number>
struct Tensors {
  const float *w, *u;
  const Number *k, *v, *grad_y;
  Number *y, *grad_k, *grad_v;
  float *grad_w, *grad_u;
  int64_t k_batch, k_time, v_batch, v_time, grad_y_batch, grad_y_time;
  int64_t batch, length, channels, chunks;
  float* fields;  // (fields_of(backward), batch, chunks, channels), then two (batch, channels)

  BIWKV_DEVICE bool beyond(int64_t channel) const { return !within_bound(w[channel], u[channel], length); }
};

// The numbers that phases pass on in `fields`: first these, then states, which are sums over keys and, in the backward
// pass, over gradients. A state is first that of a chunk alone. join() replaces it with that of all positions before
// (forth) or after the chunk (back).
enum Field { kMax, kForwardFields, kCenter = kForwardFields, kPartW, kPartU, kBackwardFields };
enum StateField { kForth, kBack, kForwardStates, kGradForth = kForwardStates, kGradBack, kBackwardStates };

constexpr int kWidest = 5;  // largest number of floats in a state

BIWKV_SHARED constexpr int64_t fields_of(bool backward) {
  return kWidest * (backward ? kBackwardStates : kForwardStates) + (backward ? kBackwardFields : kForwardFields);
}

// Floats of workspace for each channel of each sequence.
inline int64_t numbers_of(int64_t length, bool backward) { return fields_of(backward) * chunks_of(length) + 2; }

// One channel of one chunk.
template <class Number, class Weights, bool backward>
struct Cell {
  using Real = typename Weights::Real;
  using State = typename Weights::State;

  const Tensors<Number>& all;
  int64_t b, chunk, channel, rows;
  Weights weights;
  float center;

  BIWKV_DEVICE Cell(const Tensors<Number>& all, int64_t b, int64_t chunk, int64_t channel)
      : all(all), b(b), chunk(chunk), channel(channel), weights(all.w[channel], all.u[channel], frame(0)) {
    const int64_t left = all.length - chunk * kChunk;
    rows = left < kChunk ? left : kChunk;
    center = backward && Weights::kCentered ? frame(1) : 0.0f;
  }

  BIWKV_DEVICE float& field(int which) const {
    return all.fields[((which * all.batch + b) * all.chunks + chunk) * all.channels + channel];
  }
  BIWKV_DEVICE float& frame(int which) const {
    const int64_t first = fields_of(backward) * all.chunks + which;
    return all.fields[(first * all.batch + b) * all.channels + channel];
  }
  static BIWKV_DEVICE int first_of(int which) {
    return (backward ? kBackwardFields : kForwardFields) + which * Weights::kWidth;
  }
  BIWKV_DEVICE State state(int which) const {
    float numbers[Weights::kWidth];
#pragma unroll
    for (int i = 0; i < Weights::kWidth; ++i) numbers[i] = field(first_of(which) + i);
    return Weights::get(numbers);
  }
  template <class Sums>
  BIWKV_DEVICE void put(int which, const Sums& sums) const {
    float numbers[Weights::kWidth];
    Weights::put(sums, numbers);
#pragma unroll
    for (int i = 0; i < Weights::kWidth; ++i) field(first_of(which) + i) = numbers[i];
  }

  BIWKV_DEVICE int64_t time(int row) const { return chunk * kChunk + row; }
  BIWKV_DEVICE float k(int row) const { return number(all.k[b * all.k_batch + time(row) * all.k_time + channel]); }
  BIWKV_DEVICE float v(int row) const { return number(all.v[b * all.v_batch + time(row) * all.v_time + channel]); }
  BIWKV_DEVICE float grad(int row) const {
    return number(all.grad_y[b * all.grad_y_batch + time(row) * all.grad_y_time + channel]);
  }
  BIWKV_DEVICE void write(Number* to, int row, Real x) const {
    if (row < rows) put_number(to + (b * all.length + time(row)) * all.channels + channel, static_cast<float>(x));
  }

  // Loads a block of rows as weights and centered values. Rows beyond the sequence have no weight.
  BIWKV_DEVICE void load(int block, Real (&x)[kBlock], float (&values)[kBlock]) const {
    float keys[kBlock];
#pragma unroll Weights::kUnrollRows
    for (int i = 0; i < kBlock; ++i) {
      const int row = block * kBlock + i;
      const bool inside = row < rows;
      keys[i] = inside ? k(row) : 0.0f, values[i] = inside ? v(row) - center : 0.0f;
    }
#pragma unroll Weights::kUnrollRows
    for (int i = 0; i < kBlock; ++i) {
      x[i] = block * kBlock + i < rows ? weights.weight(keys[i]) : Weights::no_weight();
    }
  }

  // For each block of the chunk, the sums of all later positions.
  BIWKV_DEVICE void sums_after(State (&after)[kBlocks]) const {
    State sum = state(kBack);
#pragma unroll Weights::kUnrollBlocks
    for (int block = kBlocks - 1; block >= 0; --block) {
      after[block] = sum;
      if (block == 0) break;
      Real x[kBlock];
      float v[kBlock];
      load(block, x, v);
#pragma unroll Weights::kUnrollRows
      for (int i = kBlock - 1; i >= 0; --i) sum = weights.push(sum, x[i], v[i]);
      sum = weights.settle(sum);
    }
  }
};

}  // namespace biwkv
