// The CPU side of the Bi-WKV4 interface: types, strips of channels, threads, and the sums over the batch.
#include <memory>
#include <new>
#include <vector>

#include "biwkv4_call.h"
#include "biwkv4_running.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace biwkv {
namespace {

// Denormals are slow on some CPUs and never matter here; the thread's own mode comes back at the end.
class FlushDenormals {
#if defined(__SSE__)
 public:
  FlushDenormals() : mode(_mm_getcsr()) { _mm_setcsr(mode | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(mode); }

 private:
  unsigned mode;
#endif
};

// Runs task(i) for each i in [0, tasks) on PyTorch's threads. Tasks are cut by sizes alone, never by the number of
// threads, so that results do not depend on it.
template <class Task>
void run_tasks(const BiwkvCall& call, int64_t tasks, const Task& task) {
  const BiwkvRange range = [](int64_t begin, int64_t end, void* context) {
    FlushDenormals mode;
    for (int64_t i = begin; i < end; ++i) (*static_cast<const Task*>(context))(i);
  };
  void* context = const_cast<Task*>(&task);
  const auto parallel_for = reinterpret_cast<BiwkvParallelFor>(call.runner);
  if (parallel_for) {
    parallel_for(0, tasks, 1, range, context);
  } else {
    range(0, tasks, context);
  }
}

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
  s.out_time = call.channels, s.lanes = lanes;
  return s;
}

// grad_w and grad_u of each sequence, summed over the batch in its order.
class ParameterGradients {
 public:
  explicit ParameterGradients(const BiwkvCall& call) : call(call), sums(2 * call.batch * call.channels) {}
  double* w_at(int64_t b, int64_t channel) { return &sums[b * call.channels + channel]; }
  double* u_at(int64_t b, int64_t channel) { return &sums[(call.batch + b) * call.channels + channel]; }

  template <class Parameter>
  void finish() {
    for (int64_t c = 0; c < call.channels; ++c) {
      double w = 0, u = 0;
      for (int64_t b = 0; b < call.batch; ++b) w += *w_at(b, c), u += *u_at(b, c);
      static_cast<Parameter*>(call.grad_w)[c] = static_cast<Parameter>(w);
      static_cast<Parameter*>(call.grad_u)[c] = static_cast<Parameter>(u);
    }
  }

 private:
  const BiwkvCall& call;
  std::vector<double> sums;
};

template <class V, class Number, class Parameter>
void running(const BiwkvCall& call, bool backward) {
  constexpr int width = Lanes<V>::count;
  const int64_t strips = (call.channels + width - 1) / width;
  using Scan = RunningScan<V, Number>;
  const int64_t states = Scan::states_of(call.length, backward);
  std::vector<typename Scan::State> memory(call.batch * strips * states);
  ParameterGradients gradients(call);
  run_tasks(call, call.batch * strips, [&](int64_t task) {
    const int64_t b = task / strips, channel = task % strips * width;
    const int lanes = static_cast<int>(channel + width <= call.channels ? width : call.channels - channel);
    const V w = load<V>(static_cast<const Parameter*>(call.w) + channel, lanes);
    const V u = load<V>(static_cast<const Parameter*>(call.u) + channel, lanes);
    Scan scan(strip_at<Number>(call, b, channel, lanes), w, u, &memory[task * states]);
    if (!backward) return scan.forward();
    V grad_w, grad_u;
    scan.backward(grad_w, grad_u);
    store(grad_w, gradients.w_at(b, channel), lanes);
    store(grad_u, gradients.u_at(b, channel), lanes);
  });
  if (backward) gradients.finish<Parameter>();
}

int dispatch(const BiwkvCall* call, bool backward) {
  try {
    switch (call->type) {
      case BIWKV_FLOAT64: running<Doubles, double, double>(*call, backward); return BIWKV_OK;
      case BIWKV_FLOAT32: running<Doubles, float, float>(*call, backward); return BIWKV_OK;
      case BIWKV_BFLOAT16: running<Doubles, Bfloat16, float>(*call, backward); return BIWKV_OK;
      case BIWKV_FLOAT16: running<Doubles, Float16, float>(*call, backward); return BIWKV_OK;
    }
  } catch (const std::bad_alloc&) {
    return BIWKV_NO_MEMORY;
  }
  return BIWKV_BAD_TYPE;
}

}  // namespace
}  // namespace biwkv

extern "C" {

int biwkv4_forward(const BiwkvCall* call) { return biwkv::dispatch(call, false); }

int biwkv4_backward(const BiwkvCall* call) { return biwkv::dispatch(call, true); }

}
