// A strip: one vector of neighbouring channels of one sequence, all the unit of work that the CPU kernels know.
#pragma once

#include <cstdint>

#include "biwkv4_call.h"

namespace biwkv {

template <class Number>
struct Strip {
  const Number *k, *v, *grad_y;
  Number *y, *grad_k, *grad_v;
  int64_t length, k_time, v_time, grad_y_time, out_time;
  int lanes;
  bool past_cache;  // results are whole cache lines, and too large to stay in the cache
};

template <class Number>
Strip<Number> strip_at(const BiwkvCall& call, int64_t b, int64_t channel, int lanes) {
  Strip<Number> s;
  const int64_t out = b * call.length * call.channels + channel;
  s.k = static_cast<const Number*>(call.k) + b * call.k_batch + channel;
  s.v = static_cast<const Number*>(call.v) + b * call.v_batch + channel;
  s.grad_y = static_cast<const Number*>(call.grad_y) + (call.grad_y ? b * call.grad_y_batch + channel : 0);
  s.y = static_cast<Number*>(call.y) + (call.y ? out : 0);
  s.grad_k = static_cast<Number*>(call.grad_k) + (call.grad_k ? out : 0);
  s.grad_v = static_cast<Number*>(call.grad_v) + (call.grad_v ? out : 0);
  s.length = call.length, s.k_time = call.k_time, s.v_time = call.v_time, s.grad_y_time = call.grad_y_time;
  s.out_time = call.channels, s.lanes = lanes, s.past_cache = false;
  return s;
}

}  // namespace biwkv
