// Vectors of LANES floats: 16 with AVX-512, 8 elsewhere (GCC and clang split them where the machine has less).
//
// Everything here is plain arithmetic in a fixed order: compiled with -ffp-contract=off, fused only where
// `fused` says so, so that a result never depends on how the compiler happened to unroll a loop.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define EXEUNT_AVX512 1
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vu16 __attribute__((vector_size(LANES * 2)));
typedef uint8_t vu8 __attribute__((vector_size(LANES)));
typedef int8_t vi8 __attribute__((vector_size(LANES)));

struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

inline vf splat(float x) { return vf{} + x; }

inline vf fused(vf a, vf b, vf c) {  // a * b + c
#if defined(EXEUNT_AVX512)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline vf larger(vf a, vf b) { return a > b ? a : b; }
inline vf smaller(vf a, vf b) { return a < b ? a : b; }
inline vf rounded(vf x) { return (x + 12582912.0f) - 12582912.0f; }  // to nearest even, for |x| < 2^22

template <class V, class T>
inline V loaded(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

// ---- float16 and bfloat16 ----------------------------------------------------------------------------------

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

inline float to_float(half x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff, bits;
  if (rest >= 0x7c00) {
    bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    bits = sign | ((rest << 13) + 0x38000000);
  } else {
    float y = float(rest) * 5.9604644775390625e-8f;  // subnormal: a multiple of 2^-24
    memcpy(&bits, &y, 4);
    bits |= sign;
  }
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

inline void put(float* p, float x) { *p = x; }

inline void put(bf16* p, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  p->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void put(half* p, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  float size = std::fabs(x);
  if (x != x) {
    p->bits = 0x7e00;
  } else if (size >= 65520.0f) {
    p->bits = sign | 0x7c00;
  } else if (size < 6.103515625e-5f) {  // subnormal: round to a multiple of 2^-24
    p->bits = sign | uint16_t(std::nearbyintf(size * 16777216.0f));
  } else {
    uint32_t rest = (bits & 0x7fffffff) - 0x38000000;
    p->bits = sign | uint16_t((rest + 0xfff + ((rest >> 13) & 1)) >> 13);
  }
}

// ---- loads and stores of the first n <= LANES values; the other lanes are 0 and memory past them untouched ----

inline vf load(const float* p, int n) {
#if defined(EXEUNT_AVX512)
  return (vf)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
#else
  if (n == LANES) return loaded<vf>(p);
  vf v{};
  memcpy(&v, p, size_t(n) * 4);
  return v;
#endif
}

inline vu16 load_u16(const void* p, int n) {
#if defined(EXEUNT_AVX512)
  return (vu16)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
#else
  vu16 v{};
  if (n == LANES) return loaded<vu16>((const uint16_t*)p);
  memcpy(&v, p, size_t(n) * 2);
  return v;
#endif
}

inline vu8 load_u8(const void* p, int n) {
#if defined(EXEUNT_AVX512)
  return (vu8)_mm_maskz_loadu_epi8(__mmask16((1u << n) - 1), p);
#else
  vu8 v{};
  memcpy(&v, p, size_t(n));
  return v;
#endif
}

// The low halves and the low bytes of whole numbers: GCC 12 takes the plain conversions apart byte by byte.
inline vu16 low_halves(vi x) {
#if defined(EXEUNT_AVX512)
  return (vu16)_mm512_maskz_cvtepi32_epi16(__mmask16(-1), (__m512i)x);
#elif defined(__AVX2__)
  __m256i pairs = _mm256_packus_epi32((__m256i)(x & 0xffff), _mm256_setzero_si256());
  return (vu16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
#else
  return __builtin_convertvector((vu)x, vu16);
#endif
}

inline vu8 low_bytes(vi x) {
#if defined(EXEUNT_AVX512)
  return (vu8)_mm512_maskz_cvtepi32_epi8(__mmask16(-1), (__m512i)x);
#elif defined(__AVX2__)
  const __m128i all = _mm_packus_epi16((__m128i)low_halves(x & 0xff), _mm_setzero_si128());
  vu8 low;
  memcpy(&low, &all, sizeof low);
  return low;
#else
  return __builtin_convertvector((vu)x, vu8);
#endif
}

inline vf from_half(vu16 bits) {
#if defined(EXEUNT_AVX512)
  return (vf)_mm512_maskz_cvtph_ps(__mmask16(-1), (__m256i)bits);
#elif defined(__AVX2__) && defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)bits);
#else
  vf v{};
  for (int i = 0; i < LANES; i++) v[i] = to_float(half{bits[i]});
  return v;
#endif
}

inline vf load(const bf16* p, int n) { return (vf)(__builtin_convertvector(load_u16(p, n), vu) << 16); }
inline vf load(const half* p, int n) { return from_half(load_u16(p, n)); }

template <class T>
inline void store(T* p, vf v, int n) {
  if (sizeof(T) == 4 && n == LANES) {
    memcpy((void*)p, &v, sizeof v);
    return;
  }
  for (int i = 0; i < n; i++) put(p + i, v[i]);
}

// ---- sums over lanes, exponential ----------------------------------------------------------------------------

// The lanes exchanged in neighbouring runs of 1, 2, 4, 8.
#if defined(EXEUNT_AVX512)
inline vf swap1(vf v) { return SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14); }
inline vf swap2(vf v) { return SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13); }
inline vf swap4(vf v) { return SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11); }
inline vf swap8(vf v) { return SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7); }
#else
inline vf swap1(vf v) { return SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6); }
inline vf swap2(vf v) { return SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5); }
inline vf swap4(vf v) { return SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3); }
#endif

inline float sum(vf v) {
#if defined(EXEUNT_AVX512)
  v += swap8(v);
#endif
  v += swap4(v);
  v += swap2(v);
  v += swap1(v);
  return v[0];
}

inline float largest(vf v) {
#if defined(EXEUNT_AVX512)
  v = larger(v, swap8(v));
#endif
  v = larger(v, swap4(v));
  v = larger(v, swap2(v));
  return larger(v, swap1(v))[0];
}

// Every second lane of two vectors, from the first on and from the second on.
#if defined(EXEUNT_AVX512)
template <class V>
inline V evens(V a, V b) {
  return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
template <class V>
inline V odds(V a, V b) {
  return SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
#else
template <class V>
inline V evens(V a, V b) {
  return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
}
template <class V>
inline V odds(V a, V b) {
  return SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}
#endif

// The larger of `sizes` and |x| by lane, both as the bits of floats: as integers these order alike, NaN above everything.
inline vi with_sizes(vi sizes, vf x) {
  const vi size = (vi)x & 0x7fffffff;
  return size > sizes ? size : sizes;
}

inline float largest_size(vi sizes) {
  int32_t top = 0;
  for (int i = 0; i < LANES; i++) top = sizes[i] > top ? sizes[i] : top;
  float size;
  memcpy(&size, &top, 4);
  return size;
}

template <class V>
inline V pair_sums(V a, V b) {  // [a0+a1, a2+a3, …, b0+b1, …]
  return evens(a, b) + odds(a, b);
}

inline vf exponential(vf x) {  // e^x to 2 ulp for x <= 88; below -87 it is e^-87, callers mask what must be 0
  x = x < -87.0f ? splat(-87.0f) : x;  // keeps NaN
  vf n = rounded(x * 1.44269504088896341f);
  vf r = fused(n, splat(-0.693359375f), x);
  r = fused(n, splat(2.12194440e-4f), r);
  vf y = splat(1.9875691500e-4f);
  y = fused(y, r, splat(1.3981999507e-3f));
  y = fused(y, r, splat(8.3334519073e-3f));
  y = fused(y, r, splat(4.1665795894e-2f));
  y = fused(y, r, splat(1.6666665459e-1f));
  y = fused(y, r, splat(5.0000001201e-1f));
  y = fused(y, r * r, r) + 1.0f;
  vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
  return y * (vf)exponent;
}
