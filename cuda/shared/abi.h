// The C interface of the Bi-WKV4 kernels: one plain struct. The library needs no PyTorch headers, so it builds in
// seconds and works with any ABI. modules/biwkv4/kernels.py has the same fields in the same order.
#pragma once

#include <cstdint>

enum BiwkvType : int64_t { BIWKV_FLOAT64 = 0, BIWKV_FLOAT32 = 1, BIWKV_BFLOAT16 = 2, BIWKV_FLOAT16 = 3 };

enum BiwkvStatus : int { BIWKV_OK = 0, BIWKV_NO_MEMORY = 1, BIWKV_BAD_TYPE = 2, BIWKV_CUDA_ERROR = 1000 };

typedef void (*BiwkvRange)(int64_t begin, int64_t end, void* context);
// The signature of torch_parallel_for. The kernels run on PyTorch's threads, whose number torch.set_num_threads sets.
typedef int (*BiwkvParallelFor)(int64_t begin, int64_t end, int64_t grain, BiwkvRange range, void* context);

struct BiwkvCall {
  int64_t batch, length, channels;         // B, T, C
  int64_t type;                            // BiwkvType of k, v, y, grad_y, grad_k, grad_v
  const void *w, *u;                       // (C,), float32 (float64 for BIWKV_FLOAT64)
  const void *k, *v;                       // (B, T, C), channel innermost
  int64_t k_batch, k_time;                 // strides of k in elements
  int64_t v_batch, v_time;                 // strides of v in elements
  void* y;                                 // (B, T, C), contiguous; forward pass only
  const void* grad_y;                      // (B, T, C), channel innermost; grad_* are for the backward pass only
  int64_t grad_y_batch, grad_y_time;       // strides of grad_y in elements
  void *grad_w, *grad_u;                   // (C,), of w's type
  void *grad_k, *grad_v;                   // (B, T, C), contiguous
  void* runner;                            // CPU: a BiwkvParallelFor or null (one thread); CUDA: the stream
  void* workspace;                         // CUDA: biwkv4_workspace() bytes; CPU: unused
};
