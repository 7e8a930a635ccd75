// Number types and e^x for a GPU thread. A plain C++ compiler gets only float, with which the tests run the phases on a
// CPU.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define BIWKV_DEVICE __device__ __forceinline__
#else
#define BIWKV_DEVICE inline
#endif

namespace biwkv {

BIWKV_DEVICE float number(float x) { return x; }
BIWKV_DEVICE void put_number(float* p, float x) { *p = x; }

// If b is NaN, the result is NaN, as on the CPU.
BIWKV_DEVICE float larger(float a, float b) { return a > b ? a : b; }

#if defined(__CUDACC__)

BIWKV_DEVICE float number(__nv_bfloat16 x) { return __bfloat162float(x); }
BIWKV_DEVICE float number(__half x) { return __half2float(x); }
BIWKV_DEVICE void put_number(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }
BIWKV_DEVICE void put_number(__half* p, float x) { *p = __float2half_rn(x); }

// The hardware's 2^x, with a correction for the rounding of x log2(e), which alone causes an error of 4e-6 at x = -60.
BIWKV_DEVICE float exponential(float x) {
  constexpr float log2e = 1.44269504f, ln2 = 0.693147181f;
  x = x < -200.0f ? -200.0f : x;
  const float scaled = x * log2e;
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(scaled));
  const float lost = fmaf(x, log2e, -scaled) * ln2;
  return fmaf(power, lost, power);
}

#else

BIWKV_DEVICE float exponential(float x) { return x < -87.3f ? 0.0f : std::exp(x); }

#endif

}  // namespace biwkv
