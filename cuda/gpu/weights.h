// Two ways to keep the weights of sums within range on a GPU, with one interface for phases.h.
#pragma once

#include <cmath>

#include "../shared/accumulators.h"
#include "device.h"

namespace biwkv {

constexpr int kBlock = 8;   // rows held in registers
constexpr int kLanes = 32;  // channels of a block of threads, one for each lane of a warp

// What sums over keys and values are relative to: they are sums of e^(k - base) (v - center).
struct Frame {
  float base, center;
};

// For channels within the bound: plain sums in float32.
struct OneShift {
  using Real = float;
  using State = Sum<float>;
  struct Out : Output<float> {
    float own;
  };
  static constexpr bool kBeyond = false, kCentered = true;
  static constexpr int kLanesAtOnce = kLanes;
  static constexpr int kWidth = 2, kUnroll = kBlock;  // numbers in a state; everything in registers

  float w, decay, boost, drift;

  BIWKV_DEVICE OneShift(float w, float u) : w(w), boost(exponential(u)) {
    const float less_one = expm1f(-w);
    const bool slow = less_one > -0.5f;  // with a fast decay only a few powers matter
    decay = slow ? 1.0f + less_one : exponential(-w);
    drift = slow ? kBlock * (less_one - (decay - 1.0f)) / decay : 0.0f;
  }

  // The base is half of the whole decay below the largest key, which keeps the sums of weights near one.
  static BIWKV_DEVICE float base_of(float max, float whole) { return max - 0.5f * whole; }

  static BIWKV_DEVICE State nothing() { return {0.0f, 0.0f}; }
  static BIWKV_DEVICE float weight(float k, float base) { return exponential(k - base); }

  BIWKV_DEVICE State push(const State& sum, float x, float v) const { return sum_push(sum, decay, x * v, x); }
  BIWKV_DEVICE State push(const State& sum, const State& g) const { return sum_push(sum, decay, g.n, g.d); }
  // Corrects the error of the rounded decay, which adds up over a block of pushes.
  BIWKV_DEVICE State settle(const State& sum) const { return {sum.n + drift * sum.n, sum.d + drift * sum.d}; }
  BIWKV_DEVICE State aged(const State& sum, int64_t rows) const {
    const float age = exponential(-w * static_cast<float>(rows));
    return {sum.n * age, sum.d * age};
  }
  static BIWKV_DEVICE State plus(const State& a, const State& b) { return {a.n + b.n, a.d + b.d}; }
  static BIWKV_DEVICE State moved(const State& sum, const Frame& from, const Frame& to) {
    const float scale = exponential(from.base - to.base);
    return {(sum.n + (from.center - to.center) * sum.d) * scale, sum.d * scale};
  }

  BIWKV_DEVICE Out output(const State& before, const State& after, float x, float v) const {
    const float own = boost * x;
    return {sum_output(before, after, own, v), own};
  }
  // What a row adds to the sums over gradients.
  BIWKV_DEVICE State gradient(const Out& out, float grad) const {
    const float a = grad * out.inverse;
    return {a, a * out.y};
  }
  BIWKV_DEVICE float own_part(const Out& out, const State& g, float) const { return out.own * g.n; }
  BIWKV_DEVICE float to_key(float x, float v, const State& g) const { return x * (v * g.n - g.d); }
  BIWKV_DEVICE float to_value(float x, const State& gradients) const { return x * gradients.n; }
  BIWKV_DEVICE float crossing(const State& keys, const State& gradients) const { return flux(keys, gradients); }
  BIWKV_DEVICE float to_w(float crossings) const { return -decay * crossings; }

  template <class Store>
  static BIWKV_DEVICE State get(const Store* from, int64_t stride) {
    return {static_cast<float>(from[0]), static_cast<float>(from[stride])};
  }
  template <class Store>
  static BIWKV_DEVICE void put(const State& sum, Store* to, int64_t stride) {
    to[0] = sum.n, to[stride] = sum.d;
  }
};

// For channels beyond the bound: a running maximum in float64, for any w, u and k. A `weight` here is its logarithm.
struct RunningMaximum {
  using Real = double;
  using State = Running;
  using Out = RunningOutput;
  static constexpr bool kBeyond = true, kCentered = false;
  static constexpr int kLanesAtOnce = 8;         // so that they need no more memory than 32 channels within the bound
  static constexpr int kWidth = 3, kUnroll = 1;  // otherwise registers would spill

  double w, u;

  BIWKV_DEVICE RunningMaximum(float w, float u) : w(w), u(u) {}

  static BIWKV_DEVICE float base_of(float max, float) { return max; }

  // Below any key that matters, but finite, so that the difference of two of them is zero, not NaN.
  static BIWKV_DEVICE double no_weight() { return -536870912; }
  static BIWKV_DEVICE State nothing() { return {0, 0, no_weight()}; }
  static BIWKV_DEVICE double weight(float k, float base) {
    return larger(no_weight(), static_cast<double>(k) - static_cast<double>(base));
  }

  BIWKV_DEVICE State push(const State& sum, double x, double v) const { return running_push(sum, w, x, v, 1.0); }
  BIWKV_DEVICE State push(const State& sum, const State& g) const { return running_push(sum, w, g.m, g.n, g.d); }
  static BIWKV_DEVICE State settle(const State& exact) { return exact; }
  BIWKV_DEVICE State aged(const State& sum, int64_t rows) const {
    return {sum.n, sum.d, sum.m - w * static_cast<double>(rows)};
  }
  static BIWKV_DEVICE State plus(const State& a, const State& b) { return running_join(a, b); }
  static BIWKV_DEVICE State moved(const State& sum, const Frame& from, const Frame& to) {
    return {sum.n, sum.d, larger(no_weight(), sum.m + (static_cast<double>(from.base) - static_cast<double>(to.base)))};
  }

  BIWKV_DEVICE Out output(const State& before, const State& after, double x, double v) const {
    return running_output(before, after, u + x, v);
  }
  BIWKV_DEVICE State gradient(const Out& out, double grad) const {
    const double a = grad / out.d;
    return {a, a * out.y, -out.m};
  }
  BIWKV_DEVICE double own_part(const Out& out, const State&, double grad) const { return out.own * grad; }
  BIWKV_DEVICE double to_key(double x, double v, const State& gradients) const {
    return exponential(x + gradients.m) * (v * gradients.n - gradients.d);
  }
  BIWKV_DEVICE double to_value(double x, const State& gradients) const {
    return exponential(x + gradients.m) * gradients.n;
  }
  // The factor e^-w is inside the exponent, because the product may overflow without it.
  BIWKV_DEVICE double crossing(const State& keys, const State& gradients) const {
    return exponential(keys.m + gradients.m - w) * (keys.n * gradients.n - keys.d * gradients.d);
  }
  BIWKV_DEVICE double to_w(double crossings) const { return -crossings; }

  template <class Store>
  static BIWKV_DEVICE State get(const Store* from, int64_t stride) {
    return {from[0], from[stride], from[2 * stride]};
  }
  template <class Store>
  static BIWKV_DEVICE void put(const State& sum, Store* to, int64_t stride) {
    to[0] = sum.n, to[stride] = sum.d, to[2 * stride] = sum.m;
  }
};

}  // namespace biwkv
