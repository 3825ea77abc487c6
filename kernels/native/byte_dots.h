// Integer sums of products of bytes, four to a lane. They are exact: no order of summation shows.
#pragma once

#include "simd.h"

typedef uint8_t vbytes __attribute__((vector_size(LANES * 4)));

// sum + in each lane the four products of bytes of `a`, unsigned, and of `b`, signed. One of them holds INT4 codes.
inline vi dot4(vi sum, vbytes a, vbytes b) {
#if defined(EXEUNT_AVX512) && defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
  typedef int8_t vsigned __attribute__((vector_size(LANES * 4)));
  typedef int16_t vproducts __attribute__((vector_size(LANES * 8)));
  typedef int32_t vpairs __attribute__((vector_size(LANES * 8)));
  const vpairs products = (vpairs)(__builtin_convertvector(a, vproducts) * __builtin_convertvector((vsigned)b, vproducts));
  const vpairs pairs = ((products << 16) >> 16) + (products >> 16);
  vi halves[2];
  memcpy(halves, &pairs, sizeof halves);
  return sum + pair_sums(halves[0], halves[1]);
#endif
}

// The same of two pairs at once.
inline vi dot8(vi sum, vbytes a0, vbytes b0, vbytes a1, vbytes b1) {
#if defined(EXEUNT_AVX512) && !defined(__AVX512VNNI__)
  __m512i pairs = _mm512_add_epi16(_mm512_maddubs_epi16((__m512i)a0, (__m512i)b0),
                                   _mm512_maddubs_epi16((__m512i)a1, (__m512i)b1));
  return sum + (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__) && !defined(EXEUNT_AVX512)  // 16-bit sums stay below 4 × 15 × 255
  __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)a0, (__m256i)b0),
                                   _mm256_maddubs_epi16((__m256i)a1, (__m256i)b1));
  return sum + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  return dot4(dot4(sum, a0, b0), a1, b1);
#endif
}

inline vbytes four_times(int32_t bytes) { return (vbytes)(vi{} + bytes); }  // the same four bytes in every lane

// `x` four times over, one behind the other.
inline vbytes repeated(vu8 x) {
#if defined(EXEUNT_AVX512)
  return (vbytes)_mm512_broadcast_i32x4((__m128i)x);
#else
  vbytes all;
  for (int k = 0; k < 4; k++) memcpy((char*)&all + k * LANES, &x, LANES);
  return all;
#endif
}

// `count` bytes from `at` on of each of four places, one behind the other, each filled up to LANES with 0.
inline vbytes four_runs(const char* const* places, int64_t at, int count) {
#if defined(EXEUNT_AVX512)
  __m512i all = _mm512_castsi128_si512((__m128i)load_u8(places[0] + at, count));
  all = _mm512_inserti32x4(all, (__m128i)load_u8(places[1] + at, count), 1);
  all = _mm512_inserti32x4(all, (__m128i)load_u8(places[2] + at, count), 2);
  return (vbytes)_mm512_inserti32x4(all, (__m128i)load_u8(places[3] + at, count), 3);
#elif defined(__AVX2__)
  int64_t run[4] = {};
  for (int k = 0; k < 4; k++) memcpy(run + k, places[k] + at, size_t(count));
  return (vbytes)_mm256_set_epi64x(run[3], run[2], run[1], run[0]);
#else
  vbytes all{};
  for (int k = 0; k < 4; k++) memcpy((char*)&all + k * LANES, places[k] + at, size_t(count));
  return all;
#endif
}

// Four runs of LANES bytes as lanes of the four first bytes, the four second ones, …
inline vbytes interleaved(vbytes runs) {
#if defined(EXEUNT_AVX512) && defined(__AVX512VBMI__)
  alignas(64) static constexpr uint8_t FROM[64] = {
      0, 16, 32, 48, 1, 17, 33, 49, 2,  18, 34, 50, 3,  19, 35, 51, 4,  20, 36, 52, 5,  21,
      37, 53, 6, 22, 38, 54, 7, 23, 39, 55, 8,  24, 40, 56, 9,  25, 41, 57, 10, 26, 42, 58,
      11, 27, 43, 59, 12, 28, 44, 60, 13, 29, 45, 61, 14, 30, 46, 62, 15, 31, 47, 63};
  return (vbytes)_mm512_permutexvar_epi8(_mm512_load_si512(FROM), (__m512i)runs);
#elif defined(EXEUNT_AVX512)
  __m512i all = (__m512i)runs;
  __m128i a = _mm512_castsi512_si128(all), b = _mm512_extracti32x4_epi32(all, 1);
  __m128i c = _mm512_extracti32x4_epi32(all, 2), d = _mm512_extracti32x4_epi32(all, 3);
  __m128i ab = _mm_unpacklo_epi8(a, b), cd = _mm_unpacklo_epi8(c, d);
  __m512i out = _mm512_castsi128_si512(_mm_unpacklo_epi16(ab, cd));
  out = _mm512_inserti32x4(out, _mm_unpackhi_epi16(ab, cd), 1);
  ab = _mm_unpackhi_epi8(a, b), cd = _mm_unpackhi_epi8(c, d);
  out = _mm512_inserti32x4(out, _mm_unpacklo_epi16(ab, cd), 2);
  return (vbytes)_mm512_inserti32x4(out, _mm_unpackhi_epi16(ab, cd), 3);
#elif defined(__AVX2__)
  __m128i ab = _mm256_castsi256_si128((__m256i)runs), cd = _mm256_extracti128_si256((__m256i)runs, 1);
  ab = _mm_unpacklo_epi8(ab, _mm_unpackhi_epi64(ab, ab));
  cd = _mm_unpacklo_epi8(cd, _mm_unpackhi_epi64(cd, cd));
  return (vbytes)_mm256_set_m128i(_mm_unpackhi_epi16(ab, cd), _mm_unpacklo_epi16(ab, cd));
#else
  vbytes out;
  for (int i = 0; i < LANES; i++)
    for (int k = 0; k < 4; k++) out[4 * i + k] = runs[k * LANES + i];
  return out;
#endif
}
