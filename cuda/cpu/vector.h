// One machine vector of floats, with one lane per channel, and its loads and stores of any number type. The compiler
// translates its vector extensions to AVX-512, AVX2, NEON or SSE, depending on the build's flags.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace biwkv {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / sizeof(float);

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

// If b is NaN, the result is NaN, because a comparison with NaN is false.
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// e^x for x up to 88, and zero below -87.7, so that sums do not start from denormals. It is a degree-6 minimax
// polynomial over [-ln2/2, ln2/2] with a relative error under 2e-9 before rounding.
inline Floats exponential(Floats x) {
  x = larger(Floats{} - 88.02f, x);
  const Floats rounder = x * 1.44269504f + 12582912.0f;  // its last bits are the nearest integer to x log2(e)
  x -= (rounder - 12582912.0f) * 0.693147182f;
  Floats p = x * 0.0013836794532834854f + 0.008374856784939766f;
  p = p * x + 0.041668228805065155f;
  p = p * x + 0.16666419804096222f;
  p = p * x + 0.49999991059303284f;
  p = p * x + 1.0f;
  p = p * x + 1.0f;
  return p * (Floats)(((Ints)rounder + 127) << 23);
}

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Floats widen(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void narrow(Floats x, float* p) { std::memcpy(p, &x, sizeof x); }

inline Floats widen(const Bfloat16* p) {
  Halves raw;
  std::memcpy(&raw, p, sizeof raw);
  return (Floats)(__builtin_convertvector(raw, Words) << 16);
}
inline void narrow(Floats x, Bfloat16* p) {
  const Words bits = (Words)x, rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Words quiet = bits | 0x400000u;  // rounding could turn a NaN into an infinity
  const Halves raw = __builtin_convertvector((x != x ? quiet : rounded) >> 16, Halves);
  std::memcpy(p, &raw, sizeof raw);
}

// Intrinsics, because the compiler converts one lane at a time without them.
inline Floats widen(const Float16* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  _Float16 raw[kLanes];
  std::memcpy(raw, p, sizeof raw);
  Floats x;
  for (int i = 0; i < kLanes; ++i) x[i] = raw[i];
  return x;
#endif
}
inline void narrow(Floats x, Float16* p) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, 8));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, 8));
#else
  _Float16 raw[kLanes];
  for (int i = 0; i < kLanes; ++i) raw[i] = static_cast<_Float16>(x[i]);
  std::memcpy(p, raw, sizeof raw);
#endif
}

// Stores to an aligned address past the caches, if the processor can: it need not read the cache lines first.
template <class Number>
inline void narrow_past_caches(Floats x, Number* p) {
#if defined(__AVX512F__)
  alignas(kVectorBytes) Number row[kLanes];
  narrow(x, row);
  if constexpr (sizeof row == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), *reinterpret_cast<const __m512i*>(row));
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<const __m256i*>(row));
  }
#else
  narrow(x, p);
#endif
}

// Stores past the caches are not ordered. This makes them visible before the task ends.
inline void finish_past_caches() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// `lanes` is kLanes, or fewer at the last channels of a tensor. The remaining lanes are zero.
template <class Number>
inline Floats load(const Number* p, int lanes) {
  if (__builtin_expect(lanes == kLanes, 1)) return widen(p);
  Number padded[kLanes] = {};
  std::memcpy(padded, p, lanes * sizeof(Number));
  return widen(padded);
}
template <class Number>
inline void store(Floats x, Number* p, int lanes) {
  if (__builtin_expect(lanes == kLanes, 1)) return narrow(x, p);
  Number padded[kLanes];
  narrow(x, padded);
  std::memcpy(p, padded, lanes * sizeof(Number));
}

}  // namespace biwkv
