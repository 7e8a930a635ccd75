// e^x for a GPU thread. The tests also compile the phases with a plain C++ compiler.
#pragma once

#include <cmath>

namespace biwkv {

#if defined(__CUDACC__)

#define BIWKV_DEVICE __device__ __forceinline__

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

#define BIWKV_DEVICE inline

BIWKV_DEVICE float exponential(float x) { return x < -87.3f ? 0.0f : std::exp(x); }

#endif

}  // namespace biwkv
