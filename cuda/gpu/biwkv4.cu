// The CUDA implementation of the interface: number types and launches.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../shared/abi.h"
#include "schedule.h"
#include "thread.h"
#include "weights.h"

namespace biwkv {
namespace {

constexpr int kThreads = 128;  // of a block of sum_parameters

template <class T>
struct Each {
  T& thread;

  template <class Phase>
  __device__ __forceinline__ void operator()(const Phase& phase) const {
    if (thread.active) phase(thread);
    __syncthreads();
  }
};

// Runs the phases for the channels beyond the bound. They are rare, and most blocks find none. It is a call, so that
// its registers and arrays do not slow the other channels.
template <class Number, Stage stage>
__device__ __noinline__ void run_beyond(const Work& all, double* board) {
  for (int from = 0; from < kLanes; from += RunningMaximum::kLanesAtOnce) {
    Thread<Number, RunningMaximum, is_backward(stage)> thread(all, board, blockIdx.x, threadIdx.y, threadIdx.x, from);
    if (__syncthreads_or(thread.active)) run_phases<stage>(Each<decltype(thread)>{thread}, all.tiles > 1);
  }
}

template <class Number, Stage stage>
__global__ void __launch_bounds__(kLanes * kWarps, is_backward(stage) ? 1 : 2)
    each_tile(const __grid_constant__ Work all) {
  __shared__ double board[kBoardBytes / sizeof(double)];
  Thread<Number, OneShift, is_backward(stage)> thread(all, board, blockIdx.x, threadIdx.y, threadIdx.x, 0);
  run_phases<stage>(Each<decltype(thread)>{thread}, all.tiles > 1);
  if (__syncthreads_or(thread.channel < all.channels && !thread.active)) run_beyond<Number, stage>(all, board);
}

__global__ void __launch_bounds__(kThreads) each_channel(const __grid_constant__ Work all) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (channel < all.channels) sum_parameters(all, channel);
}

template <class Number>
struct Launches {
  const Work& all;

  template <Stage stage>
  void run() const {
    const dim3 threads(kLanes, all.warps);
    each_tile<Number, stage><<<static_cast<unsigned>(all.blocks()), threads, 0, stream()>>>(all);
  }
  void sum_parameters() const {
    each_channel<<<static_cast<unsigned>((all.channels + kThreads - 1) / kThreads), kThreads, 0, stream()>>>(all);
  }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(all.runner); }
};

int run(const BiwkvCall* call, bool backward) {
  const Work all(*call);
  switch (all.type) {
    case BIWKV_FLOAT32: run_stages(Launches<float>{all}, backward, all.tiles > 1); break;
    case BIWKV_BFLOAT16: run_stages(Launches<__nv_bfloat16>{all}, backward, all.tiles > 1); break;
    case BIWKV_FLOAT16: run_stages(Launches<__half>{all}, backward, all.tiles > 1); break;
    default: return BIWKV_BAD_TYPE;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? BIWKV_OK : BIWKV_CUDA_ERROR + error;
}

}  // namespace
}  // namespace biwkv

extern "C" {

int biwkv4_forward(const BiwkvCall* call) { return biwkv::run(call, false); }

int biwkv4_backward(const BiwkvCall* call) { return biwkv::run(call, true); }

// Bytes of workspace that a call needs.
int64_t biwkv4_workspace(const BiwkvCall* call, int) { return biwkv::Work(*call).bytes_of_workspace(); }

const char* biwkv4_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status - BIWKV_CUDA_ERROR)); }
}
