// Bi-WKV4 on a GPU: a thread is one channel of one chunk of time, neighbouring threads are neighbouring channels. Threads
// never wait for one another and share nothing but global memory, so that the tests run these very functions on the CPU
// (tests/modules/biwkv4_emulation.cpp), a thread after another.
//
// Whoever includes this defines BIWKV_DEVICE, and number(), put_number(), exponential() and larger() beforehand.
//
// Each chunk's own sums (sum_keys), the channel's frame, the sums before and after each chunk (join_keys), and then each
// chunk again from these: the same phases as on the CPU, in the same arithmetic, at -60 <= w T <= 60 and |u| <= 20. A
// channel beyond that bound is filled with NaN: it cannot be noticed on the host without waiting for the device. Below
// w T = -6, where the CPU turns to float64, dL/dw loses digits (four are left at -60).
#pragma once

#include <cmath>
#include <cstdint>

#include "biwkv4_arithmetic.h"

namespace biwkv {

constexpr int kChunk = 64, kBlock = 8, kBlocks = kChunk / kBlock;  // rows of a chunk; rows that live in registers

template <class Number>
struct Tensors {
  const float *w, *u;
  const Number *k, *v, *grad_y;
  Number *y, *grad_k, *grad_v;
  float *grad_w, *grad_u;
  int64_t k_batch, k_time, v_batch, v_time, grad_y_batch, grad_y_time;
  int64_t batch, length, channels, chunks;
  float* fields;                                     // (kFields, batch, chunks, channels), then two (batch, channels)
};

// What the phases leave in `fields` for one another; the forward pass needs those before kGradForthN.
enum Field {
  kSumForthN, kSumForthD, kSumBackN, kSumBackD, kMax, kForthN, kForthD, kBackN, kBackD, kForwardFields,
  kCentre = kForwardFields, kGradSumForthN, kGradSumForthD, kGradSumBackN, kGradSumBackD, kGradForthN, kGradForthD,
  kGradBackN, kGradBackD, kPartW, kPartU, kBackwardFields
};

// One channel of one chunk.
template <class Number, bool backward>
struct Cell {
  static constexpr int kFields = backward ? kBackwardFields : kForwardFields;

  const Tensors<Number>& all;
  int64_t b, chunk, channel, rows;
  float w, decay, boost, shift, centre;

  BIWKV_DEVICE Cell(const Tensors<Number>& all, int64_t b, int64_t chunk, int64_t channel)
      : all(all), b(b), chunk(chunk), channel(channel) {
    const int64_t left = all.length - chunk * kChunk;
    rows = left < kChunk ? left : kChunk;
    w = all.w[channel];
    const float whole = w * all.length, u = all.u[channel];
    const bool within = whole >= -60 && whole <= 60 && u >= -20 && u <= 20;
    decay = within ? exponential(-w) : NAN;
    boost = exponential(u);
    shift = frame(0), centre = backward ? frame(1) : 0.0f;
  }

  BIWKV_DEVICE float& field(int which) const {
    return all.fields[((which * all.batch + b) * all.chunks + chunk) * all.channels + channel];
  }
  BIWKV_DEVICE float& frame(int which) const {
    return all.fields[(kFields * all.chunks + which) * all.batch * all.channels + b * all.channels + channel];
  }
  BIWKV_DEVICE Sum<float> sum(int which) const { return {field(which), field(which + 1)}; }
  BIWKV_DEVICE void put(int which, const Sum<float>& sum) const { field(which) = sum.n, field(which + 1) = sum.d; }

  BIWKV_DEVICE int64_t time(int row) const { return chunk * kChunk + row; }
  BIWKV_DEVICE float k(int row) const { return number(all.k[b * all.k_batch + time(row) * all.k_time + channel]); }
  BIWKV_DEVICE float v(int row) const { return number(all.v[b * all.v_batch + time(row) * all.v_time + channel]); }
  BIWKV_DEVICE float grad(int row) const {
    return number(all.grad_y[b * all.grad_y_batch + time(row) * all.grad_y_time + channel]);
  }
  BIWKV_DEVICE void write(Number* to, int row, float x) const {
    if (row < rows) put_number(to + (b * all.length + time(row)) * all.channels + channel, x);
  }

  // A block of rows in the channel's frame; beyond the sequence the weight is zero.
  BIWKV_DEVICE void load(int block, float (&x)[kBlock], float (&values)[kBlock]) const {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const int row = block * kBlock + i;
      const bool inside = row < rows;
      x[i] = inside ? k(row) : 0.0f, values[i] = inside ? v(row) - centre : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kBlock; ++i) x[i] = block * kBlock + i < rows ? exponential(x[i] - shift) : 0.0f;
  }

  // The sums of all that comes after each block of the chunk.
  BIWKV_DEVICE void sums_after(Sum<float> (&after)[kBlocks]) const {
    Sum<float> sum = this->sum(kBackN);
#pragma unroll
    for (int block = kBlocks - 1; block >= 0; --block) {
      after[block] = sum;
      if (block == 0) break;
      float x[kBlock], v[kBlock];
      load(block, x, v);
#pragma unroll
      for (int i = kBlock - 1; i >= 0; --i) sum = sum_push(sum, decay, x[i] * v[i], x[i]);
    }
  }
};

// A block of rows of the backward pass, in registers.
struct Block {
  float x[kBlock], v[kBlock], a[kBlock], b[kBlock];
  float grad_k[kBlock], grad_v[kBlock];  // all but what later positions add
  Sum<float> keys[kBlock];               // the sums over keys before each row
};

// Fills a block from the sums at its start (over keys: before, over gradients: earlier), which move on to its end, and
// from those of the keys after its end; adds what it can tell of the gradients of w (over -decay) and u.
template <class Number>
BIWKV_DEVICE void walk(const Cell<Number, true>& cell, int block, Block& rows, Sum<float>& before, Sum<float> after,
                       Sum<float>& earlier, float& to_w, float& to_u) {
  cell.load(block, rows.x, rows.v);
#pragma unroll
  for (int i = kBlock - 1; i >= 0; --i) {
    rows.keys[i] = after;
    after = sum_push(after, cell.decay, rows.x[i] * rows.v[i], rows.x[i]);
  }
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    const bool inside = block * kBlock + i < cell.rows;
    const float x = rows.x[i], v = rows.v[i], own = cell.boost * x;
    const Output<float> out = sum_output(before, rows.keys[i], own, v);
    const float a = inside ? cell.grad(block * kBlock + i) * out.inverse : 0.0f;
    const float b = inside ? a * out.y : 0.0f, bonus = inside ? own * a * out.off : 0.0f;
    to_u += bonus;
    to_w += flux(rows.keys[i], earlier);
    rows.a[i] = a, rows.b[i] = b;
    rows.grad_k[i] = x * (v * earlier.n - earlier.d) + bonus, rows.grad_v[i] = x * earlier.n + own * a;
    rows.keys[i] = before;
    if (!inside) continue;  // a decay below one, again and again, would end in infinity times zero
    before = sum_push(before, cell.decay, x * v, x);
    earlier = sum_push(earlier, cell.decay, a, b);
  }
}

// ---- the phases, one call a thread ------------------------------------------------------------------------------

template <class Number, bool backward>
BIWKV_DEVICE void sum_keys(const Tensors<Number>& all, int64_t b, int64_t chunk, int64_t channel) {
  const Cell<Number, backward> cell(all, b, chunk, channel);
  float max = -3.40282347e38f;  // above -inf: a chunk of nothing but -inf is zeros, not NaN
#pragma unroll 8
  for (int row = 0; row < cell.rows; ++row) max = larger(max, cell.k(row));
  float centre = 0.0f;
  if (backward) {
    Sum<float> mean = {0.0f, 0.0f};
#pragma unroll 8
    for (int row = 0; row < cell.rows; ++row) {
      const float x = exponential(cell.k(row) - max);
      mean = {mean.n + x * cell.v(row), mean.d + x};
    }
    centre = mean.n / mean.d;
    centre = centre == centre ? centre : 0.0f;
    cell.field(kCentre) = centre;
  }
  Sum<float> forth = {0.0f, 0.0f}, back = {0.0f, 0.0f};
  float power = 1.0f;
#pragma unroll 8
  for (int row = 0; row < cell.rows; ++row) {
    const float x = exponential(cell.k(row) - max), xv = x * (cell.v(row) - centre);
    forth = sum_push(forth, cell.decay, xv, x);
    back = {back.n + power * xv, back.d + power * x};
    power *= cell.decay;
  }
  cell.put(kSumForthN, forth);
  cell.put(kSumBackN, back);
  cell.field(kMax) = max;
}

// The channel's shift and centre, from its chunks'.
template <class Number, bool backward>
BIWKV_DEVICE void find_frame(const Tensors<Number>& all, int64_t b, int64_t channel) {
  float max = -3.40282347e38f;
#pragma unroll 8
  for (int64_t c = 0; c < all.chunks; ++c) max = larger(max, Cell<Number, backward>(all, b, c, channel).field(kMax));
  // Half of the decay on either side of the largest key; less for a growth, which keys far below it may yet use.
  const float whole = all.w[channel] * all.length;
  const Cell<Number, backward> first(all, b, 0, channel);
  const float shift = max - whole * (whole > 0 ? 0.5f : 1.0f / 6);
  first.frame(0) = shift;
  if (!backward) return;
  double n = 0, d = 0;
#pragma unroll 4
  for (int64_t c = 0; c < all.chunks; ++c) {
    const Cell<Number, backward> cell(all, b, c, channel);
    const double weight = cell.field(kSumForthD) * exponential(static_cast<double>(cell.field(kMax)) - max);
    n += weight * cell.field(kCentre), d += weight;
  }
  const float centre = static_cast<float>(n / d);
  first.frame(1) = centre == centre ? centre : 0.0f;
}

// Each chunk's own sum to the sum of all before (forth) or after (back) it, in float64.
template <class Number, bool backward>
BIWKV_DEVICE void join_keys(const Tensors<Number>& all, int64_t b, int64_t channel, bool back) {
  const double skip = exponential(-static_cast<double>(all.w[channel]) * kChunk);
  Sum<double> sum = {0, 0};
#pragma unroll 8
  for (int64_t i = 0; i < all.chunks; ++i) {
    const Cell<Number, backward> cell(all, b, back ? all.chunks - 1 - i : i, channel);
    const Sum<float> own = cell.sum(back ? kSumBackN : kSumForthN);
    const double scale = exponential(static_cast<double>(cell.field(kMax)) - cell.shift);
    const double uncentre = backward ? static_cast<double>(cell.field(kCentre)) - cell.centre : 0;
    cell.put(back ? kBackN : kForthN, {static_cast<float>(sum.n), static_cast<float>(sum.d)});
    sum = sum_push(sum, skip, (own.n + uncentre * own.d) * scale, own.d * scale);
  }
}

template <class Number>
BIWKV_DEVICE void join_gradients(const Tensors<Number>& all, int64_t b, int64_t channel, bool back) {
  const double skip = exponential(-static_cast<double>(all.w[channel]) * kChunk);
  Sum<double> sum = {0, 0};
#pragma unroll 8
  for (int64_t i = 0; i < all.chunks; ++i) {
    const Cell<Number, true> cell(all, b, back ? all.chunks - 1 - i : i, channel);
    const Sum<float> own = cell.sum(back ? kGradSumBackN : kGradSumForthN);
    cell.put(back ? kGradBackN : kGradForthN, {static_cast<float>(sum.n), static_cast<float>(sum.d)});
    sum = sum_push(sum, skip, static_cast<double>(own.n), static_cast<double>(own.d));
  }
}

template <class Number>
BIWKV_DEVICE void write_output(const Tensors<Number>& all, int64_t b, int64_t chunk, int64_t channel) {
  const Cell<Number, false> cell(all, b, chunk, channel);
  Sum<float> after[kBlocks], before = cell.sum(kForthN);
  cell.sums_after(after);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    float x[kBlock], v[kBlock];
    Sum<float> later[kBlock], sum = after[block];
    cell.load(block, x, v);
#pragma unroll
    for (int i = kBlock - 1; i >= 0; --i) {
      later[i] = sum;
      sum = sum_push(sum, cell.decay, x[i] * v[i], x[i]);
    }
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      cell.write(all.y, block * kBlock + i, sum_output(before, later[i], cell.boost * x[i], v[i]).y);
      before = sum_push(before, cell.decay, x[i] * v[i], x[i]);
    }
  }
}

template <class Number>
BIWKV_DEVICE void sum_gradients(const Tensors<Number>& all, int64_t b, int64_t chunk, int64_t channel) {
  const Cell<Number, true> cell(all, b, chunk, channel);
  Sum<float> after[kBlocks], before = cell.sum(kForthN), forth = {0.0f, 0.0f}, back = {0.0f, 0.0f};
  float power = 1.0f, to_w = 0.0f, to_u = 0.0f;
  cell.sums_after(after);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    Block rows;
    walk(cell, block, rows, before, after[block], forth, to_w, to_u);
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if (block * kBlock + i >= cell.rows) continue;
      back = {back.n + power * rows.a[i], back.d + power * rows.b[i]};
      power *= cell.decay;
    }
  }
  cell.put(kGradSumForthN, forth);
  cell.put(kGradSumBackN, back);
}

template <class Number>
BIWKV_DEVICE void write_gradients(const Tensors<Number>& all, int64_t b, int64_t chunk, int64_t channel) {
  const Cell<Number, true> cell(all, b, chunk, channel);
  Sum<float> after[kBlocks], before[kBlocks], earlier[kBlocks];  // at each block: over keys, keys, gradients
  float to_w = 0.0f, to_u = 0.0f;
  cell.sums_after(after);
  before[0] = cell.sum(kForthN), earlier[0] = cell.sum(kGradForthN);
#pragma unroll
  for (int block = 0; block + 1 < kBlocks; ++block) {
    Block rows;
    float unused_w = 0.0f, unused_u = 0.0f;
    before[block + 1] = before[block], earlier[block + 1] = earlier[block];
    walk(cell, block, rows, before[block + 1], after[block], earlier[block + 1], unused_w, unused_u);
  }
  Sum<float> later = cell.sum(kGradBackN);
#pragma unroll
  for (int block = kBlocks - 1; block >= 0; --block) {
    Block rows;
    walk(cell, block, rows, before[block], after[block], earlier[block], to_w, to_u);
#pragma unroll
    for (int i = kBlock - 1; i >= 0; --i) {
      const float x = rows.x[i];
      cell.write(all.grad_k, block * kBlock + i, rows.grad_k[i] + x * (rows.v[i] * later.n - later.d));
      cell.write(all.grad_v, block * kBlock + i, rows.grad_v[i] + x * later.n);
      to_w += flux(rows.keys[i], later);
      later = sum_push(later, cell.decay, rows.a[i], rows.b[i]);
    }
  }
  cell.field(kPartW) = -cell.decay * to_w;
  cell.field(kPartU) = to_u;
}

// The gradients of one channel's w and u, over the batch and the chunks in their order.
template <class Number>
BIWKV_DEVICE void sum_parameters(const Tensors<Number>& all, int64_t channel) {
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
