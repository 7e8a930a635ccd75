// The running-maximum kernels over whole tensors, a strip a task.
#pragma once

#include <atomic>

#include "biwkv4_running.h"
#include "biwkv4_tasks.h"

namespace biwkv {

// Channels [channel, channel + lanes) of sequence b with a running maximum; w_at and u_at are null in the forward pass.
template <class V, class Number, class Parameter>
void run_strip(const BiwkvCall& call, int64_t b, int64_t channel, int lanes, double* w_at, double* u_at) {
  using Scan = RunningScan<V, Number>;
  std::vector<typename Scan::State> states(Scan::states_of(call.length, w_at != nullptr));
  const V w = load<V>(static_cast<const Parameter*>(call.w) + channel, lanes);
  const V u = load<V>(static_cast<const Parameter*>(call.u) + channel, lanes);
  Scan scan(strip_at<Number>(call, b, channel, lanes), w, u, states.data());
  if (!w_at) return scan.forward();
  V grad_w, grad_u;
  scan.backward(grad_w, grad_u);
  store(grad_w, w_at, lanes);
  store(grad_u, u_at, lanes);
}

template <class V, class Number, class Parameter>
void running(const BiwkvCall& call, bool backward) {
  constexpr int width = Lanes<V>::count;
  const int64_t strips = (call.channels + width - 1) / width;
  ParameterGradients gradients(call, strips, 1, width);
  std::atomic<bool> full{false};
  run_tasks(call, call.batch * strips, [&](int64_t task) {
    const int64_t b = task / strips, strip = task % strips;
    try {
      run_strip<V, Number, Parameter>(call, b, strip * width, lanes_at(call, strip * width, width),
                                      backward ? gradients.w_at(b, strip, 0) : nullptr, gradients.u_at(b, strip, 0));
    } catch (const std::bad_alloc&) {
      full = true;
    }
  });
  if (full) throw std::bad_alloc();
  if (backward) gradients.finish<Parameter>();
}

}  // namespace biwkv
