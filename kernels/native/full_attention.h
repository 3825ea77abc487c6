// Attention over full pages, which are read in their dtype.
#pragma once

#include "attention_heads.h"

template <class T>
struct FullPages {
  static constexpr int UNIT = 1;  // vectors of values that one load yields
  static constexpr bool INT4 = false;

  // The products of four keys with GT heads, from `chunk` on in every key.
  template <int GT>
  static inline __attribute__((always_inline)) void add_products(vf (&part)[GT][4], const char* const* keys,
                                                                 const Head* heads, int64_t chunk, int count) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const vf key = load((const T*)keys[j] + chunk * LANES, count);
#pragma GCC unroll 4
      for (int g = 0; g < GT; g++) part[g][j] = fused(heads[g].query[chunk], key, part[g][j]);
    }
  }

  // scores[g] of GT heads against the block's keys, by lane.
  template <int GT>
  static inline __attribute__((always_inline)) void score(const KeyBlock& block, const Shape& shape, const Head* heads,
                                                          vf (&scores)[GT]) {
    vf fours[GT][LANES / 4];
#pragma GCC unroll 4
    for (int k = 0; k < LANES; k += 4) {
      vf part[GT][4];
#pragma GCC unroll 4
      for (int g = 0; g < GT; g++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) part[g][j] = vf{};
      int64_t c = 0;
      for (; c < shape.whole; c++) add_products<GT>(part, block.keys + k, heads, c, LANES);
      if (c < shape.chunks) add_products<GT>(part, block.keys + k, heads, c, shape.rest);
#pragma GCC unroll 4
      for (int g = 0; g < GT; g++)
        fours[g][k / 4] = pair_sums(pair_sums(part[g][0], part[g][1]), pair_sums(part[g][2], part[g][3]));
    }
#pragma GCC unroll 4
    for (int g = 0; g < GT; g++) {
#if defined(EXEUNT_AVX512)
      scores[g] = pair_sums(pair_sums(fours[g][0], fours[g][1]), pair_sums(fours[g][2], fours[g][3]));
#else
      scores[g] = pair_sums(fours[g][0], fours[g][1]);
#endif
    }
  }

  // Adds one chunk of a span's values to GT heads.
  template <int GT>
  static inline __attribute__((always_inline)) void mix_chunk(const KeySpan& span, Head* heads,
                                                              const vf (&p)[GT][SPAN], int64_t c, int count) {
    vf mixed[GT];
#pragma GCC unroll 4
    for (int g = 0; g < GT; g++) mixed[g] = heads[g].mixed[c];
    for (int b = 0; b < span.count; b++) {
#pragma GCC unroll 2
      for (int k = 0; k < LANES; k++) {
        const vf value = load((const T*)span.blocks[b].values[k] + c * LANES, count);
#pragma GCC unroll 4
        for (int g = 0; g < GT; g++) mixed[g] = fused(splat(((const float*)&p[g][b])[k]), value, mixed[g]);
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < GT; g++) heads[g].mixed[c] = mixed[g];
  }

  // Adds a span's values to GT heads with weights p[g] by block and lane.
  template <int GT>
  static inline __attribute__((always_inline)) void mix(const KeySpan& span, const Shape& shape, Head* heads,
                                                        const vf (&p)[GT][SPAN]) {
    int64_t c = 0;
    for (; c < shape.whole; c++) mix_chunk<GT>(span, heads, p, c, LANES);
    if (c < shape.chunks) mix_chunk<GT>(span, heads, p, c, shape.rest);
  }
};
