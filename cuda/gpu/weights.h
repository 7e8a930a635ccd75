// Two ways to keep the weights of sums within range on a GPU, with one interface for phases.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "../shared/accumulators.h"
#include "device.h"

namespace biwkv {

constexpr int kBlock = 8;  // rows held in registers

// For channels within the bound: one shift of the keys per channel, and plain sums in float32, joined in float64.
struct OneShift {
  using Real = float;
  using State = Sum<float>;
  using Joined = Sum<double>;
  struct Gradient {
    float a, b;
  };
  struct Out : Output<float> {
    float own;
  };
  static constexpr int kWidth = 2;                              // floats in a state
  static constexpr int kUnrollBlocks = 8, kUnrollRows = kBlock;  // everything in registers
  static constexpr bool kCentered = true;

  float decay, boost, shift, drift;

  BIWKV_DEVICE OneShift(float w, float u, float shift) : boost(exponential(u)), shift(shift) {
    const float less_one = expm1f(-w);
    const bool slow = less_one > -0.5f;  // with a fast decay only a few powers matter
    decay = slow ? 1.0f + less_one : exponential(-w);
    drift = slow ? kBlock * (less_one - (decay - 1.0f)) / decay : 0.0f;
  }

  // The shift is half of the whole decay below the largest key, which keeps the sums of weights near one.
  static BIWKV_DEVICE float shift_of(float max, float whole) { return max - 0.5f * whole; }

  static BIWKV_DEVICE State nothing() { return {0.0f, 0.0f}; }
  static BIWKV_DEVICE Gradient no_gradient() { return {0.0f, 0.0f}; }
  static BIWKV_DEVICE float no_weight() { return 0.0f; }
  BIWKV_DEVICE float weight(float k) const { return exponential(k - shift); }

  BIWKV_DEVICE State push(const State& sum, float x, float v) const { return sum_push(sum, decay, x * v, x); }
  BIWKV_DEVICE State push(const State& sum, const Gradient& g) const { return sum_push(sum, decay, g.a, g.b); }
  // Corrects the error of the rounded decay, which adds up over a block of pushes.
  BIWKV_DEVICE float settle(float age) const { return age + drift * age; }
  BIWKV_DEVICE State settle(const State& sum) const { return {settle(sum.n), settle(sum.d)}; }
  // `age` is the decay from the chunk's start to a row. `add` sums rows with it, for the positions before the chunk.
  static BIWKV_DEVICE float near() { return 1.0f; }
  BIWKV_DEVICE float farther(float age) const { return age * decay; }
  BIWKV_DEVICE State add(const State& sum, float age, float x, float v) const {
    const float xv = x * v;
    return {sum.n + age * xv, sum.d + age * x};
  }
  BIWKV_DEVICE State add(const State& sum, float age, const Gradient& g) const {
    return {sum.n + age * g.a, sum.d + age * g.b};
  }

  BIWKV_DEVICE Out output(const State& before, const State& after, float x, float v) const {
    const float own = boost * x;
    return {sum_output(before, after, own, v), own};
  }
  BIWKV_DEVICE Gradient gradient(const Out& out, float grad) const {
    const float a = grad * out.inverse;
    return {a, a * out.y};
  }
  BIWKV_DEVICE float own_part(const Out& out, const Gradient& g, float) const { return out.own * g.a; }
  BIWKV_DEVICE float to_key(float x, float v, const State& gradients) const { return x * (v * gradients.n - gradients.d); }
  BIWKV_DEVICE float to_value(float x, const State& gradients) const { return x * gradients.n; }
  BIWKV_DEVICE float crossing(const State& keys, const State& gradients) const { return flux(keys, gradients); }
  BIWKV_DEVICE float to_w(float crossings) const { return -decay * crossings; }

  static BIWKV_DEVICE double skip(float w, int rows) { return exponential(-static_cast<double>(w) * rows); }
  static BIWKV_DEVICE Joined join(const Joined& sum, double skip, const Joined& own) {
    return sum_push(sum, skip, own.n, own.d);
  }
  static BIWKV_DEVICE Joined moved(const Joined& own, double by, double uncenter) {
    const double scale = exponential(by);
    return {(own.n + uncenter * own.d) * scale, own.d * scale};
  }
  static BIWKV_DEVICE State get(const float (&from)[kWidth]) { return {from[0], from[1]}; }
  static BIWKV_DEVICE Joined widen(const State& own) { return {own.n, own.d}; }
  static BIWKV_DEVICE Joined none_joined() { return {0.0, 0.0}; }
  template <class S>
  static BIWKV_DEVICE void put(const S& sum, float (&to)[kWidth]) {
    to[0] = static_cast<float>(sum.n), to[1] = static_cast<float>(sum.d);
  }
};

// For channels beyond the bound: a running maximum in float64, for any w, u and k. A `weight` here is its logarithm.
struct RunningMaximum {
  using Real = double;
  using State = Running;
  using Joined = Running;
  struct Gradient {
    double a, b, m;  // a and b times e^-m
  };
  using Out = RunningOutput;
  static constexpr int kWidth = 5;  // n and d, each as a float and its rounding error, and m
  static constexpr int kUnrollBlocks = 1, kUnrollRows = 1;  // otherwise registers would spill
  static constexpr bool kCentered = false;

  Real w, u;
  float shift;

  BIWKV_DEVICE RunningMaximum(float w, float u, float shift) : w(w), u(u), shift(shift) {}

  static BIWKV_DEVICE float shift_of(float max, float) { return max; }

  // Below any key that matters, but finite, so that the difference of two of them is zero, not NaN. Its magnitude
  // is small enough for a float to represent its difference from other keys.
  static BIWKV_DEVICE Real no_weight() { return Real(-536870912); }
  static BIWKV_DEVICE State nothing() { return {0, 0, no_weight()}; }
  static BIWKV_DEVICE Gradient no_gradient() { return {0, 0, no_weight()}; }
  BIWKV_DEVICE Real weight(float k) const { return larger(no_weight(), Real(k) - Real(shift)); }

  BIWKV_DEVICE State push(const State& sum, Real x, Real v) const { return running_push(sum, w, x, v, Real(1)); }
  BIWKV_DEVICE State push(const State& sum, const Gradient& g) const { return running_push(sum, w, g.m, g.a, g.b); }
  template <class Settled>
  static BIWKV_DEVICE Settled settle(const Settled& exact) {
    return exact;
  }
  static BIWKV_DEVICE Real near() { return 0; }
  BIWKV_DEVICE Real farther(Real age) const { return age - w; }
  BIWKV_DEVICE State add(const State& sum, Real age, Real x, Real v) const {
    return running_push(sum, Real(0), x + age, v, Real(1));
  }
  BIWKV_DEVICE State add(const State& sum, Real age, const Gradient& g) const {
    return running_push(sum, Real(0), g.m + age, g.a, g.b);
  }

  BIWKV_DEVICE Out output(const State& before, const State& after, Real x, Real v) const {
    return running_output(before, after, u + x, v);
  }
  BIWKV_DEVICE Gradient gradient(const Out& out, Real grad) const {
    const Real a = grad / out.d;
    return {a, a * out.y, -out.m};
  }
  BIWKV_DEVICE Real own_part(const Out& out, const Gradient&, Real grad) const { return out.own * grad; }
  BIWKV_DEVICE Real to_key(Real x, Real v, const State& gradients) const {
    return exponential(x + gradients.m) * (v * gradients.n - gradients.d);
  }
  BIWKV_DEVICE Real to_value(Real x, const State& gradients) const {
    return exponential(x + gradients.m) * gradients.n;
  }
  // The factor e^-w is inside the exponent, because the product may overflow without it.
  BIWKV_DEVICE Real crossing(const State& keys, const State& gradients) const {
    return exponential(keys.m + gradients.m - w) * (keys.n * gradients.n - keys.d * gradients.d);
  }
  BIWKV_DEVICE Real to_w(Real crossings) const { return -crossings; }

  static BIWKV_DEVICE double skip(float w, int rows) { return static_cast<double>(w) * rows; }
  static BIWKV_DEVICE Joined join(const Joined& sum, double skip, const Joined& own) {
    return running_join({sum.n, sum.d, sum.m - skip}, own);
  }
  static BIWKV_DEVICE Joined moved(const Joined& own, double by, double) {
    return {own.n, own.d, own.m + by};
  }
  static BIWKV_DEVICE State get(const float (&from)[kWidth]) {
    return {Real(from[0]) + Real(from[1]), Real(from[2]) + Real(from[3]), Real(from[4])};
  }
  static BIWKV_DEVICE Joined widen(const State& own) { return {own.n, own.d, own.m}; }
  static BIWKV_DEVICE Joined none_joined() { return {0, 0, no_weight()}; }
  // Stores the maximum as a float, and multiplies its rounding error into the sums.
  template <class S>
  static BIWKV_DEVICE void put(const S& sum, float (&to)[kWidth]) {
    const double m = larger(static_cast<double>(no_weight()), static_cast<double>(sum.m));
    to[4] = static_cast<float>(m);
    const double rest = exponential(m - static_cast<double>(to[4])), n = sum.n * rest, d = sum.d * rest;
    to[0] = static_cast<float>(n), to[1] = static_cast<float>(n - static_cast<double>(to[0]));
    to[2] = static_cast<float>(d), to[3] = static_cast<float>(d - static_cast<double>(to[2]));
  }
};

}  // namespace biwkv
