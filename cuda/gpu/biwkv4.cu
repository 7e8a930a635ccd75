// The CUDA implementation of the interface: number types, launches, and slices that fit the L2 cache.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "../shared/abi.h"
#include "cell.h"
#include "phases.h"
#include "weights.h"

namespace biwkv {
namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32, kWorkers = 4;  // for channels beyond the bound: channels of a block, and threads per channel

// The sequences and channels of one launch.
struct Slice {
  int64_t batch, batches, channel, channels;
};

template <class Number, void (*phase)(const Tensors<Number>&, int64_t, int64_t, int64_t)>
__global__ void __launch_bounds__(kThreads) each_cell(Tensors<Number> all, Slice slice) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at < slice.channels) phase(all, slice.batch + blockIdx.z, static_cast<int64_t>(blockIdx.y), slice.channel + at);
}

// Runs each phase as one launch over a slice.
template <class Number>
struct Launches {
  const Tensors<Number>& all;
  Slice slice;
  cudaStream_t stream;

  template <void (*phase)(const Tensors<Number>&, int64_t, int64_t, int64_t)>
  void run(int64_t rows) const {
    const dim3 grid(static_cast<unsigned>((slice.channels + kThreads - 1) / kThreads), static_cast<unsigned>(rows),
                    static_cast<unsigned>(slice.batches));
    each_cell<Number, phase><<<grid, kThreads, 0, stream>>>(all, slice);
  }
};

// Runs each phase in one block, for the 32 channels of a warp and one sequence.
template <class Number>
struct OneBlock {
  const Tensors<Number>& all;
  int64_t b, channel;
  bool beyond;

  template <void (*phase)(const Tensors<Number>&, int64_t, int64_t, int64_t)>
  __device__ void run(int64_t rows) const {
    for (int64_t row = threadIdx.y; beyond && row < rows; row += kWorkers) phase(all, b, row, channel);
    __syncthreads();
  }
};

// Runs all phases for the channels beyond the bound, in one launch. Most blocks find no such channel and end at once.
template <class Number, bool backward>
__global__ void __launch_bounds__(kWarp * kWorkers, 1) each_beyond(Tensors<Number> all) {
  const int64_t groups = (all.channels + kWarp - 1) / kWarp, channel = blockIdx.x % groups * kWarp + threadIdx.x;
  const bool beyond = channel < all.channels && all.beyond(channel);
  if (!__syncthreads_or(beyond)) return;
  run_phases<Number, RunningMaximum, backward>(
      OneBlock<Number>{all, static_cast<int64_t>(blockIdx.x / groups), channel, beyond}, all.chunks);
}

// A slice of k, v and grad_y stays in the L2 cache for the later phases, unless it must be larger to fill the device.
template <class Number, bool backward>
void run_slices(const Tensors<Number>& all, cudaStream_t stream) {
  int device = 0, cache = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t of_channel = all.length * static_cast<int64_t>(sizeof(Number)) * (backward ? 3 : 2);
  const int64_t fits = cache / 2 / of_channel, fills = processors * 1024LL / all.chunks + 1;
  const int64_t columns = std::max<int64_t>(std::max(fits, fills), kThreads);  // pairs of sequence and channel
  const int64_t batches = std::min<int64_t>(std::max<int64_t>(columns / all.channels, 1), 65535);
  const int64_t channels = batches > 1 || columns >= all.channels ? all.channels : columns / kThreads * kThreads;
  for (int64_t b = 0; b < all.batch; b += batches) {
    for (int64_t c = 0; c < all.channels; c += channels) {
      const Slice slice = {b, std::min(batches, all.batch - b), c, std::min(channels, all.channels - c)};
      run_phases<Number, OneShift, backward>(Launches<Number>{all, slice, stream}, all.chunks);
    }
  }
}

template <class Number, bool backward>
void run(const Tensors<Number>& all, cudaStream_t stream) {
  run_slices<Number, backward>(all, stream);
  const int64_t groups = (all.channels + kWarp - 1) / kWarp;
  each_beyond<Number, backward><<<static_cast<unsigned>(groups * all.batch), dim3(kWarp, kWorkers), 0, stream>>>(all);
  if constexpr (backward) {
    Launches<Number>{all, {0, 1, 0, all.channels}, stream}.template run<sum_parameters<Number>>(1);
  }
}

template <class Number>
int run_as(const BiwkvCall& call, bool backward) {
  Tensors<Number> all;
  all.w = static_cast<const float*>(call.w), all.u = static_cast<const float*>(call.u);
  all.k = static_cast<const Number*>(call.k), all.v = static_cast<const Number*>(call.v);
  all.grad_y = static_cast<const Number*>(call.grad_y), all.y = static_cast<Number*>(call.y);
  all.grad_k = static_cast<Number*>(call.grad_k), all.grad_v = static_cast<Number*>(call.grad_v);
  all.grad_w = static_cast<float*>(call.grad_w), all.grad_u = static_cast<float*>(call.grad_u);
  all.k_batch = call.k_batch, all.k_time = call.k_time, all.v_batch = call.v_batch, all.v_time = call.v_time;
  all.grad_y_batch = call.grad_y_batch, all.grad_y_time = call.grad_y_time;
  all.batch = call.batch, all.length = call.length, all.channels = call.channels;
  all.chunks = chunks_of(call.length), all.fields = static_cast<float*>(call.workspace);
  const auto stream = static_cast<cudaStream_t>(call.runner);
  backward ? run<Number, true>(all, stream) : run<Number, false>(all, stream);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? BIWKV_OK : BIWKV_CUDA_ERROR + error;
}

int dispatch(const BiwkvCall* call, bool backward) {
  switch (call->type) {
    case BIWKV_FLOAT32: return run_as<float>(*call, backward);
    case BIWKV_BFLOAT16: return run_as<__nv_bfloat16>(*call, backward);
    case BIWKV_FLOAT16: return run_as<__half>(*call, backward);
  }
  return BIWKV_BAD_TYPE;
}

}  // namespace
}  // namespace biwkv

extern "C" {

int biwkv4_forward(const BiwkvCall* call) { return biwkv::dispatch(call, false); }

int biwkv4_backward(const BiwkvCall* call) { return biwkv::dispatch(call, true); }

// Bytes of workspace that a call needs.
int64_t biwkv4_workspace(const BiwkvCall* call, int backward) {
  return biwkv::numbers_of(call->length, backward) * call->batch * call->channels * static_cast<int64_t>(sizeof(float));
}

const char* biwkv4_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status - BIWKV_CUDA_ERROR)); }
}
