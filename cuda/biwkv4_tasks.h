// What the CPU kernels share: strips, threads, memory, and sums over the batch.
#pragma once

#include <memory>
#include <new>
#include <vector>

#include "biwkv4_call.h"
#include "biwkv4_vector.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace biwkv {

// One vector of neighbouring channels of one sequence: all the unit of work that the kernels know.
template <class Number>
struct Strip {
  const Number *k, *v, *grad_y;
  Number *y, *grad_k, *grad_v;
  int64_t length, k_time, v_time, grad_y_time, out_time;
  int lanes;
  bool past_cache;  // results are whole cache lines, and too large to stay in the cache
};

constexpr size_t kLarge = size_t{4} << 20;  // bytes of a result that will have left the caches when it is read

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

// Stores past the caches keep no order of their own; other threads wait for this.
inline void finish_past_cache() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}

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

// grad_w and grad_u of each strip and segment of time, summed in a fixed order.
class ParameterGradients {
 public:
  ParameterGradients(const BiwkvCall& call, int64_t strips, int64_t segments, int width)
      : call(call), strips(strips), segments(segments), width(width), sums(2 * call.batch * strips * segments * width) {}

  double* w_at(int64_t b, int64_t strip, int64_t segment) {
    return &sums[((b * strips + strip) * segments + segment) * 2 * width];
  }
  double* u_at(int64_t b, int64_t strip, int64_t segment) { return w_at(b, strip, segment) + width; }

  template <class Parameter>
  void finish() {
    for (int64_t c = 0; c < call.channels; ++c) {
      double w = 0, u = 0;
      for (int64_t b = 0; b < call.batch; ++b) {
        for (int64_t segment = 0; segment < segments; ++segment) {
          w += w_at(b, c / width, segment)[c % width], u += u_at(b, c / width, segment)[c % width];
        }
      }
      static_cast<Parameter*>(call.grad_w)[c] = static_cast<Parameter>(w);
      static_cast<Parameter*>(call.grad_u)[c] = static_cast<Parameter>(u);
    }
  }

 private:
  const BiwkvCall& call;
  int64_t strips, segments;
  int width;
  std::vector<double> sums;
};

inline int lanes_at(const BiwkvCall& call, int64_t channel, int width) {
  return static_cast<int>(channel + width <= call.channels ? width : call.channels - channel);
}

// Memory without a value: aligned, uninitialised, grown and never shrunk.
class Buffer {
 public:
  void* at_least(size_t bytes) {
    if (bytes > size) {
      memory.reset();
      memory.reset(::operator new(bytes, std::align_val_t{kVectorBytes}));
      size = bytes;
    }
    return memory.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{kVectorBytes}); }
  };
  std::unique_ptr<void, Free> memory;
  size_t size = 0;
};

}  // namespace biwkv
