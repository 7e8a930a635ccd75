// The arithmetic of Bi-WKV4, one position at a time, for the CPU and the GPU. V is a float or a vector of neighboring
// channels.
//
// With x_i = e^{k_i}, decay = e^{-w} and, for each t, prefix and suffix sums that exclude t,
//   F_t = sum_{i<t} decay^{t-1-i} x_i (v_i, 1),    G_t = sum_{i>t} decay^{i-t-1} x_i (v_i, 1),
// the output is y_t = (F.n + G.n + e^u x_t v_t) / (F.d + G.d + e^u x_t). The backward pass needs the same two sums over
//   a_t = grad_t / D_t,  b_t = a_t y_t,
// called P (prefix) and S (suffix) below. The gradient of w is a flux: (|t-i|-1) counts the positions strictly between
// i and t, so  dL/dw = -decay sum_s [F.n S.a - F.d S.b + G.n P.a - G.d P.b]_s  with no second set of sums.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define BIWKV_SHARED __host__ __device__ __forceinline__
#define BIWKV_CALLED inline __host__ __device__ __noinline__
#else
#define BIWKV_SHARED inline __attribute__((always_inline))
#define BIWKV_CALLED BIWKV_SHARED
#endif

namespace biwkv {

// Whether float32 with one shift of a channel's keys is precise enough. Within this bound, a key that underflows after
// the shift is less than e^-27 of any sum that it enters. No sum or gradient leaves float32's range. dL/dw keeps five
// digits, although more of it cancels the faster weights grow with distance. Channels beyond the bound use a running
// maximum in float64.
BIWKV_SHARED bool within_bound(float w, float u, int64_t length) {
  const float whole = w * length;
  return whole >= -3.0f && whole <= 60.0f && u >= -20.0f && u <= 20.0f;  // false for NaN
}

// ---- with one shift of the keys for a whole channel: one exponential per element ----------------------------------

template <class V>
struct Sum {
  V n, d;  // over keys and values: of x v and x; over gradients: of a and b
};

template <class V>
BIWKV_SHARED Sum<V> sum_push(const Sum<V>& sum, V decay, V n, V d) {
  return {sum.n * decay + n, sum.d * decay + d};
}

template <class V>
BIWKV_SHARED V reciprocal(V x) {
  return 1.0f / x;
}
#if defined(__CUDA_ARCH__)
// One instruction, with an error of one more unit in the last place.
BIWKV_SHARED float reciprocal(float x) { return __fdividef(1.0f, x); }
#endif

template <class V>
struct Output {
  V y;        // the weighted mean of v
  V inverse;  // 1 / D, where D is the total weight
  V off;      // v_t - y_t, without cancellation if v_t has nearly all the weight
};

template <class V>
BIWKV_SHARED Output<V> sum_output(const Sum<V>& prefix, const Sum<V>& suffix, V own, V v) {
  const V n = prefix.n + suffix.n, d = prefix.d + suffix.d;
  const V inverse = reciprocal(d + own);
  return {(n + own * v) * inverse, inverse, (v * d - n) * inverse};
}

// The part of dL/dw that crosses position t, divided by -decay.
template <class V>
BIWKV_SHARED V flux(const Sum<V>& keys, const Sum<V>& gradients) {
  return keys.n * gradients.n - keys.d * gradients.d;
}

// ---- with a running maximum: any finite w, u, k; slower (two exponentials for each sum and step) -----------------

// If b is NaN, the result is NaN, because a comparison with NaN is false.
BIWKV_SHARED double larger(double a, double b) { return a > b ? a : b; }
// On a GPU a call, because many inlined ones at a time would take too many registers.
BIWKV_CALLED double exponential(double x) { return exp(x); }

struct Running {
  double n, d, m;  // the sums are n e^m and d e^m
};

BIWKV_SHARED Running running_push(const Running& sum, double w, double key, double n, double d) {
  const double aged = sum.m - w;
  const double m = larger(aged, key);
  const double keep = exponential(aged - m), add = exponential(key - m);
  return {sum.n * keep + n * add, sum.d * keep + d * add, m};
}

BIWKV_SHARED Running running_join(const Running& aged, const Running& sum) {
  const double m = larger(aged.m, sum.m);
  const double keep = exponential(aged.m - m), add = exponential(sum.m - m);
  return {aged.n * keep + sum.n * add, aged.d * keep + sum.d * add, m};
}

struct RunningOutput {
  double y;     // the weighted mean of v
  double d, m;  // the total weight is d e^m
  double own;   // the weight of v_t in y_t
  double off;   // v_t - y_t
};

BIWKV_SHARED RunningOutput running_output(const Running& prefix, const Running& suffix, double own_key, double v) {
  const double m = larger(larger(prefix.m, suffix.m), own_key);
  const double of_prefix = exponential(prefix.m - m), of_suffix = exponential(suffix.m - m);
  const double own = exponential(own_key - m);
  const double n = prefix.n * of_prefix + suffix.n * of_suffix;
  const double d = prefix.d * of_prefix + suffix.d * of_suffix;
  const double inverse = 1 / (d + own);
  return {(n + own * v) * inverse, d + own, m, own * inverse, (v * d - n) * inverse};
}

}  // namespace biwkv
