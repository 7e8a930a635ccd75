// A strip: channels of one sequence that fill a vector, or the last few channels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../shared/abi.h"
#include "vector.h"

namespace biwkv {

constexpr int64_t kLarge = int64_t{4} << 20;  // bytes of a result that the caches no longer hold when it is read

template <class Number>
struct Strip {
  const Number *k, *v, *grad_y;
  Number *y, *grad_k, *grad_v;
  int64_t length, k_time, v_time, grad_y_time, out_time;
  int lanes;
  bool past_caches;  // results bypass the caches: they are large, and a row of the strip fills a vector

  Strip(const BiwkvCall& call, int64_t b, int64_t channel) {
    const auto at = [](auto* tensor, int64_t offset) { return tensor ? tensor + offset : nullptr; };
    const int64_t out = b * call.length * call.channels + channel;
    k = static_cast<const Number*>(call.k) + b * call.k_batch + channel;
    v = static_cast<const Number*>(call.v) + b * call.v_batch + channel;
    grad_y = at(static_cast<const Number*>(call.grad_y), b * call.grad_y_batch + channel);
    y = at(static_cast<Number*>(call.y), out);
    grad_k = at(static_cast<Number*>(call.grad_k), out);
    grad_v = at(static_cast<Number*>(call.grad_v), out);
    length = call.length, k_time = call.k_time, v_time = call.v_time, grad_y_time = call.grad_y_time;
    out_time = call.channels, lanes = static_cast<int>(std::min<int64_t>(kLanes, call.channels - channel));
    const auto aligned = [](const Number* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Number[kLanes]) == 0; };
    past_caches = call.batch * call.length * call.channels * int64_t{sizeof(Number)} >= kLarge && lanes == kLanes &&
                  call.channels % kLanes == 0 && aligned(y) && aligned(grad_k) && aligned(grad_v);
  }
};

// The contribution of a strip to the gradients of its w and u.
struct ParameterGradients {
  double w[kLanes], u[kLanes];
};

}  // namespace biwkv
