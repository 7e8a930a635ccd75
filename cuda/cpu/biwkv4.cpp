// The CPU implementation of the interface: number types, pages, threads, phases, and sums over the batch.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <new>
#include <type_traits>
#include <vector>

#include "../shared/abi.h"
#include "../shared/accumulators.h"
#include "exact_scan.h"
#include "fast_scan.h"
#include "strip.h"
#include "vector.h"

namespace biwkv {
namespace {

// The pages of a large result may not be mapped yet. Huge pages avoid most page faults, which would otherwise take as
// long as the kernel.
void ask_for_huge_pages(void* result, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 4096;
  if (!result || bytes < kLarge) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(result) + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(begin), reinterpret_cast<uintptr_t>(result) + bytes - begin, MADV_HUGEPAGE);
#endif
}

// Runs task(i) for each i in [0, tasks) on PyTorch's threads.
template <class Task>
void run_tasks(const BiwkvCall& call, int64_t tasks, const Task& task) {
  const BiwkvRange range = [](int64_t begin, int64_t end, void* context) {
    for (int64_t i = begin; i < end; ++i) (*static_cast<const Task*>(context))(i);
  };
  void* context = const_cast<Task*>(&task);
  const auto parallel_for = reinterpret_cast<BiwkvParallelFor>(call.runner);
  if (!parallel_for) return range(0, tasks, context);
  if (parallel_for(0, tasks, 1, range, context)) throw std::bad_alloc();  // a task throws nothing else
}

// A task is two neighboring strips, which alternate at each chunk: reading rows only one vector wide from memory is too
// slow.
constexpr int kTogether = 2;

template <class Number, bool backward>
void scan_fast(const BiwkvCall& call, int64_t b, int64_t first, int64_t end, ParameterGradients* gradients) {
  using Scan = FastScan<Number, backward>;
  static thread_local FastMemory<backward> memory[kTogether];
  std::vector<Scan> scans;
  scans.reserve(kTogether);
  for (int64_t strip = first; strip < end; ++strip) {
    const int64_t c = strip * kLanes;
    scans.emplace_back(Strip<Number>(call, b, c), static_cast<const float*>(call.w) + c,
                       static_cast<const float*>(call.u) + c, memory[strip - first]);
  }
  const auto each_chunk = [&](const auto& phase) {
    for (int64_t c = 0; c < scans[0].count; ++c) {
      for (Scan& scan : scans) phase(scan, c);
    }
  };
  each_chunk([](Scan& scan, int64_t c) { scan.sum_keys(c); });
  for (Scan& scan : scans) scan.join_keys();
  if constexpr (backward) {
    each_chunk([](Scan& scan, int64_t c) { scan.sum_gradients(c); });
    for (Scan& scan : scans) scan.join_gradients();
    each_chunk([&](Scan& scan, int64_t c) { scan.write_gradients(c, gradients[&scan - &scans[0]]); });
  } else {
    each_chunk([](Scan& scan, int64_t c) { scan.write_output(c); });
  }
  finish_past_caches();
}

template <class Number, bool backward, class Parameter>
void scan_exactly(const BiwkvCall& call, int64_t b, int64_t channel, ParameterGradients* gradients) {
  const Parameter w = static_cast<const Parameter*>(call.w)[channel];
  const Parameter u = static_cast<const Parameter*>(call.u)[channel];
  if (std::is_same_v<Parameter, float> && within_bound(w, u, call.length)) return;
  ExactScan<Number> scan(Strip<Number>(call, b, channel), w, u);
  if constexpr (backward) {
    scan.backward(gradients->w[channel % kLanes], gradients->u[channel % kLanes]);
  } else {
    scan.forward();
  }
}

template <class Parameter>
void sum_over_batch(const BiwkvCall& call, int64_t strips, const std::vector<ParameterGradients>& gradients) {
  for (int64_t c = 0; c < call.channels; ++c) {
    double w = 0, u = 0;
    for (int64_t b = 0; b < call.batch; ++b) {
      const ParameterGradients& part = gradients[b * strips + c / kLanes];
      w += part.w[c % kLanes], u += part.u[c % kLanes];
    }
    static_cast<Parameter*>(call.grad_w)[c] = static_cast<Parameter>(w);
    static_cast<Parameter*>(call.grad_u)[c] = static_cast<Parameter>(u);
  }
}

template <class Number, bool backward, class Parameter = float>
void run(const BiwkvCall& call) {
  const int64_t strips = (call.channels + kLanes - 1) / kLanes, of_one = (strips + kTogether - 1) / kTogether;
  const int64_t bytes = call.batch * call.length * call.channels * int64_t{sizeof(Number)};
  for (void* result : {call.y, call.grad_k, call.grad_v}) ask_for_huge_pages(result, bytes);
  std::vector<ParameterGradients> gradients(backward ? call.batch * strips : 0);
  run_tasks(call, call.batch * of_one, [&](int64_t task) {
    const int64_t b = task / of_one, first = task % of_one * kTogether, end = std::min(first + kTogether, strips);
    ParameterGradients* own = gradients.data() + (backward ? b * strips + first : 0);
    if constexpr (std::is_same_v<Parameter, float>) scan_fast<Number, backward>(call, b, first, end, own);
    for (int64_t c = first * kLanes; c < std::min(end * kLanes, call.channels); ++c) {
      scan_exactly<Number, backward, Parameter>(call, b, c, own + (backward ? c / kLanes - first : 0));
    }
  });
  if (backward) sum_over_batch<Parameter>(call, strips, gradients);
}

template <bool backward>
int dispatch(const BiwkvCall& call) {
  try {
    switch (call.type) {
      case BIWKV_FLOAT64: run<double, backward, double>(call); return BIWKV_OK;
      case BIWKV_FLOAT32: run<float, backward>(call); return BIWKV_OK;
      case BIWKV_BFLOAT16: run<Bfloat16, backward>(call); return BIWKV_OK;
      case BIWKV_FLOAT16: run<Float16, backward>(call); return BIWKV_OK;
    }
  } catch (const std::bad_alloc&) {
    return BIWKV_NO_MEMORY;
  }
  return BIWKV_BAD_TYPE;
}

}  // namespace
}  // namespace biwkv

extern "C" {

int biwkv4_forward(const BiwkvCall* call) { return biwkv::dispatch<false>(*call); }

int biwkv4_backward(const BiwkvCall* call) { return biwkv::dispatch<true>(*call); }
}
