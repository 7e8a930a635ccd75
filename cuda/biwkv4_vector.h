// A register of neighbouring channels: one machine vector of floats or doubles, loaded from and stored to any of the
// supported types. GCC's and Clang's vector extensions become AVX-512, AVX2, NEON or SSE by the build's CPU flags.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__F16C__) || defined(__SSE__)
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

template <class Scalar>
struct VectorOf {
  typedef Scalar type __attribute__((vector_size(kVectorBytes)));
};
using Floats = VectorOf<float>::type;
using Doubles = VectorOf<double>::type;
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef int64_t Longs __attribute__((vector_size(kVectorBytes)));

template <class V>
struct Lanes;
template <>
struct Lanes<Floats> {
  using scalar = float;
  using bits = Ints;
  static constexpr int count = kVectorBytes / sizeof(float);
};
template <>
struct Lanes<Doubles> {
  using scalar = double;
  using bits = Longs;
  static constexpr int count = kVectorBytes / sizeof(double);
};

#define BIWKV_INLINE inline __attribute__((always_inline))

template <class V>
BIWKV_INLINE V splat(typename Lanes<V>::scalar value) {
  return value - V{};
}

// NaN stays: a comparison with it is false, so the second argument is returned.
template <class V>
BIWKV_INLINE V larger(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm512_max_ps((__m512)a, (__m512)b);
#endif
  return a > b ? a : b;
}

// 1/x to within two roundings, for x neither zero nor infinite: a division takes as long as eight products.
BIWKV_INLINE Floats reciprocal(Floats x) {
#if defined(__AVX512F__)
  const Floats guess = (Floats)_mm512_rcp14_ps((__m512)x);
  return guess + guess * (1 - x * guess);
#else
  return 1 / x;
#endif
}

// e^x, in place, for x up to 88. Below -87.7 the result is zero (never a denormal, whose arithmetic is slow on some
// CPUs). Degree-6 minimax polynomial over [-ln2/2, ln2/2], relative error under 2e-9 before rounding. Several at a time,
// step by step: one alone is a chain of some fifty cycles, of which too few fit in a core's scheduler.
template <int count>
BIWKV_INLINE void exponentials(Floats (&x)[count]) {
  const Floats low = splat<Floats>(-88.02f);
  Floats n[count], p[count];
#if defined(__AVX512F__)
  for (int i = 0; i < count; ++i) x[i] = larger(low, x[i]);
  for (int i = 0; i < count; ++i) n[i] = (Floats)_mm512_roundscale_ps((__m512)(x[i] * 1.44269504f), 8);
  for (int i = 0; i < count; ++i) x[i] -= n[i] * 0.693147182f;
#else
  Floats shifted[count];
  for (int i = 0; i < count; ++i) x[i] = larger(low, x[i]);
  for (int i = 0; i < count; ++i) shifted[i] = x[i] * 1.44269504f + 12582912.0f;
  for (int i = 0; i < count; ++i) x[i] -= (shifted[i] - 12582912.0f) * 0.693147182f;
#endif
  for (int i = 0; i < count; ++i) p[i] = x[i] * 0.0013836794532834854f + 0.008374856784939766f;
  for (int i = 0; i < count; ++i) p[i] = p[i] * x[i] + 0.041668228805065155f;
  for (int i = 0; i < count; ++i) p[i] = p[i] * x[i] + 0.16666419804096222f;
  for (int i = 0; i < count; ++i) p[i] = p[i] * x[i] + 0.49999991059303284f;
  for (int i = 0; i < count; ++i) p[i] = p[i] * x[i] + 1.0f;
  for (int i = 0; i < count; ++i) p[i] = p[i] * x[i] + 1.0f;
#if defined(__AVX512F__)
  for (int i = 0; i < count; ++i) x[i] = (Floats)_mm512_scalef_ps((__m512)p[i], (__m512)n[i]);
#else
  for (int i = 0; i < count; ++i) x[i] = p[i] * (Floats)(((Ints)shifted[i] + 127) << 23);
#endif
}

// e^x, alone.
BIWKV_INLINE Floats exponential(Floats x) {
  Floats only[1] = {x};
  exponentials(only);
  return only[0];
}

// Two registers side by side: a recurrence waits four cycles for its last sum, in which a core can do the work of two.
struct Wide {
  Floats a, b;
};

template <>
struct Lanes<Wide> {
  using scalar = float;
  static constexpr int count = 2 * Lanes<Floats>::count;
};

BIWKV_INLINE Wide operator+(Wide x, Wide y) { return {x.a + y.a, x.b + y.b}; }
BIWKV_INLINE Wide operator-(Wide x, Wide y) { return {x.a - y.a, x.b - y.b}; }
BIWKV_INLINE Wide operator*(Wide x, Wide y) { return {x.a * y.a, x.b * y.b}; }
BIWKV_INLINE Wide operator/(Wide x, Wide y) { return {x.a / y.a, x.b / y.b}; }
BIWKV_INLINE Wide reciprocal(Wide x) { return {reciprocal(x.a), reciprocal(x.b)}; }
BIWKV_INLINE Wide operator*(Wide x, float y) { return {x.a * y, x.b * y}; }
BIWKV_INLINE Wide operator-(Wide x) { return {-x.a, -x.b}; }
BIWKV_INLINE void operator+=(Wide& x, Wide y) { x = x + y; }
BIWKV_INLINE Wide larger(Wide x, Wide y) { return {larger(x.a, y.a), larger(x.b, y.b)}; }

template <int count>
BIWKV_INLINE void exponentials(Wide (&x)[count]) {
  Floats all[2 * count];
  for (int i = 0; i < count; ++i) all[2 * i] = x[i].a, all[2 * i + 1] = x[i].b;
  exponentials(all);
  for (int i = 0; i < count; ++i) x[i] = {all[2 * i], all[2 * i + 1]};
}

BIWKV_INLINE Wide exponential(Wide x) {
  Wide only[1] = {x};
  exponentials(only);
  return only[0];
}

// The same for doubles, degree 11, error under 4e-16; zero below -708.
BIWKV_INLINE Doubles exponential(Doubles x) {
  const Doubles low = splat<Doubles>(-708.9);
  x = larger(low, x);
  const Doubles shifted = x * 1.4426950408889634 + 6755399441055744.0;
  const Doubles n = shifted - 6755399441055744.0;
  const Doubles r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  Doubles p = r * 2.9211610492052277e-08 + 2.777834486286471e-07;
  p = p * r + 2.754440636638285e-06;
  p = p * r + 2.4801058232909124e-05;
  p = p * r + 0.00019841284052220592;
  p = p * r + 0.0013888889379868805;
  p = p * r + 0.008333333326973455;
  p = p * r + 0.04166666666486354;
  p = p * r + 0.16666666666675722;
  p = p * r + 0.5000000000000172;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return p * (Doubles)(((Longs)shifted + 1023) << 52);
}

// ---- loads and stores -------------------------------------------------------------------------------------------

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <int N>
struct Halves {
  typedef uint16_t type __attribute__((vector_size(N * 2)));
};

template <class V>
BIWKV_INLINE V widen(const Bfloat16* p) {
  constexpr int N = Lanes<V>::count;
  typedef uint32_t Words __attribute__((vector_size(N * 4)));
  typedef float Singles __attribute__((vector_size(N * 4)));
  typename Halves<N>::type raw;
  std::memcpy(&raw, p, sizeof raw);
  return __builtin_convertvector((Singles)(__builtin_convertvector(raw, Words) << 16), V);
}

template <class V>
BIWKV_INLINE void narrow(V x, Bfloat16* p) {
  constexpr int N = Lanes<V>::count;
  typedef uint32_t Words __attribute__((vector_size(N * 4)));
  typedef float Singles __attribute__((vector_size(N * 4)));
  const Singles single = __builtin_convertvector(x, Singles);
  const Words bits = (Words)single;
  const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Words quiet = bits | 0x400000u;  // rounding could carry a NaN over into an infinity
  const auto raw = __builtin_convertvector((single != single ? quiet : rounded) >> 16, typename Halves<N>::type);
  std::memcpy(p, &raw, sizeof raw);
}

template <class V>
BIWKV_INLINE V widen(const Float16* p) {
  constexpr int N = Lanes<V>::count;
  V x;
#if defined(__AVX512F__)
  if constexpr (N == 16) return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  if constexpr (N == 8) return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
  for (int i = 0; i < N; ++i) {
    _Float16 half;
    std::memcpy(&half, p + i, sizeof half);
    x[i] = half;
  }
  return x;
}

template <class V>
BIWKV_INLINE void narrow(V x, Float16* p) {
  constexpr int N = Lanes<V>::count;
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, 8));
    return;
  }
#elif defined(__F16C__)
  if constexpr (N == 8) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, 8));
    return;
  }
#endif
  for (int i = 0; i < N; ++i) {
    const _Float16 half = (_Float16)(float)x[i];
    std::memcpy(p + i, &half, sizeof half);
  }
}

template <class V, class Number>
BIWKV_INLINE V widen(const Number* p) {
  typedef Number Raw __attribute__((vector_size(Lanes<V>::count * sizeof(Number))));
  Raw raw;
  std::memcpy(&raw, p, sizeof raw);
  return __builtin_convertvector(raw, V);
}

template <class V, class Number>
BIWKV_INLINE void narrow(V x, Number* p) {
  typedef Number Raw __attribute__((vector_size(Lanes<V>::count * sizeof(Number))));
  const Raw raw = __builtin_convertvector(x, Raw);
  std::memcpy(p, &raw, sizeof raw);
}

template <class Number>
BIWKV_INLINE Wide widen_two(const Number* p) {
  return {widen<Floats>(p), widen<Floats>(p + Lanes<Floats>::count)};
}

template <class Number>
BIWKV_INLINE void narrow_two(Wide x, Number* p) {
  narrow(x.a, p);
  narrow(x.b, p + Lanes<Floats>::count);
}

// Past the caches, where that exists: whole lines of a result too large to stay in them need not be read first.
template <class Number>
BIWKV_INLINE void narrow_past_cache(Wide x, Number* p) {
#if defined(__AVX512F__)
  alignas(64) Number line[Lanes<Wide>::count];
  narrow_two(x, line);
  for (size_t i = 0; i < sizeof line / 64; ++i) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p) + i, reinterpret_cast<__m512i*>(line)[i]);
  }
#else
  narrow_two(x, p);
#endif
}

// `lanes` is the vector's width, or fewer at the last channels of a tensor; the lanes beyond read as zero.
template <class V, class Number>
BIWKV_INLINE V load(const Number* p, int lanes) {
  if (__builtin_expect(lanes >= Lanes<V>::count, 1)) return widen<V>(p);
  Number padded[Lanes<V>::count] = {};
  std::memcpy(padded, p, lanes * sizeof(Number));
  return widen<V>(padded);
}

template <class V, class Number>
BIWKV_INLINE void store(V x, Number* p, int lanes) {
  if (__builtin_expect(lanes >= Lanes<V>::count, 1)) return narrow(x, p);
  Number padded[Lanes<V>::count];
  narrow(x, padded);
  std::memcpy(p, padded, lanes * sizeof(Number));
}

}  // namespace biwkv
