// The CPU side of the Bi-WKV4 interface: types and pages.
#include <new>

#include "biwkv4_call.h"
#include "biwkv4_running.h"
#include "biwkv4_shifted_tasks.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace biwkv {
namespace {

// Large results come from the system as untouched pages; asking for huge ones saves most of the faults, which may cost
// more than the kernel itself.
void ask_for_huge_pages(void* result, size_t bytes) {
#if defined(__linux__)
  constexpr size_t page = 4096;
  if (!result || bytes < kLarge) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(result) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(result) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <class Number>
void shifted(const BiwkvCall& call, bool backward) {
  const size_t bytes = call.batch * call.length * call.channels * sizeof(Number);
  for (void* result : {call.y, call.grad_k, call.grad_v}) ask_for_huge_pages(result, bytes);
  backward ? Shifted<Number, true>(call).run() : Shifted<Number, false>(call).run();
}

int dispatch(const BiwkvCall* call, bool backward) {
  try {
    switch (call->type) {
      case BIWKV_FLOAT64: running<Doubles, double, double>(*call, backward); return BIWKV_OK;
      case BIWKV_FLOAT32: shifted<float>(*call, backward); return BIWKV_OK;
      case BIWKV_BFLOAT16: shifted<Bfloat16>(*call, backward); return BIWKV_OK;
      case BIWKV_FLOAT16: shifted<Float16>(*call, backward); return BIWKV_OK;
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

// For comparison: float32 tensors by a running maximum in float32, the manner of the public kernels.
int biwkv4_running_maximum(const BiwkvCall* call, int backward) {
  if (call->type != BIWKV_FLOAT32) return BIWKV_BAD_TYPE;
  try {
    biwkv::running<biwkv::Floats, float, float>(*call, backward != 0);
  } catch (const std::bad_alloc&) {
    return BIWKV_NO_MEMORY;
  }
  return BIWKV_OK;
}

}
