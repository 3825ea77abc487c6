// Attention over INT4 pages, in sums of integers.
//
// With k = c s + m,  q·k = s Σ q c + m Σ q  and  Σ p v = Σ (p s) c + Σ p m.  A head's query and, span by span, its
// weights p s become whole numbers of 22 bits times a step, which are cut into three bytes: that rounds nearly as finely
// as float32 does. Sums of bytes times codes are exact, no code becomes a float, and the lanes of a score are joined
// once a key. Codes are 0 to 15; those of values count from -8 on, so that what is rounded off small weights beside a
// large one does not all point one way.
//
// Codes of even elements are in low nibbles, of odd ones in high nibbles: a chunk of LANES bytes of a key meets the query
// as [even, odd] elements, and yields the values' [even, odd] ones, which are put back in order at the end.
#pragma once

#include <limits>

#include "attention_heads.h"

constexpr int CUTS = 3;  // bytes of a whole number

struct Int4Pages {
  static constexpr int UNIT = 2;  // vectors of values that one load yields
  static constexpr bool INT4 = true;
  static constexpr int PARTS = CUTS * UNIT;  // of a chunk of a query: lowest bytes of even, of odd elements, the next …

  // Σ over the cuts, the lowest first. Each is below 2^21 in size.
  static inline vf joined(const vi (&sums)[CUTS]) {
    return fused(__builtin_convertvector(sums[2], vf), splat(65536.0f),
                 __builtin_convertvector((sums[1] << 8) + sums[0], vf));
  }

  // Rounds a query x [chunks, 2] vectors, 0 past the head's end, to whole numbers, writes their bytes to `codes`
  // [chunks, PARTS], and sets the head's step and sum.
  static void round_query(const vf* x, int64_t chunks, vbytes* codes, Head* head) {
    constexpr float MOST = float((1 << 21) - 1);
    vi sizes{};
    for (int64_t i = 0; i < chunks * UNIT; i++) sizes = with_sizes(sizes, x[i]);
    const float size = largest_size(sizes);
    const bool usable = size >= 1e-30f && size <= std::numeric_limits<float>::max();
    const float inverse = usable ? MOST / size : 0.0f;
    head->query_step = usable ? size * (1.0f / MOST) : size < 1e-30f ? 0.0f : NAN;
    head->codes = codes;
    vf total{};
    for (int64_t c = 0; c < chunks; c++) {
      const vf halves[UNIT] = {evens(x[2 * c], x[2 * c + 1]), odds(x[2 * c], x[2 * c + 1])};
      for (int h = 0; h < UNIT; h++) {
        const vf exact = usable ? rounded(halves[h] * inverse) : vf{};
        vi whole = __builtin_convertvector(exact, vi);
        for (int cut = 0; cut < CUTS; cut++) {
          codes[PARTS * c + UNIT * cut + h] = repeated(low_bytes(whole));
          whole = (whole + 128) >> 8;  // bytes are signed
        }
        total += exact;
      }
    }
    head->query_sum = head->query_step * sum(total);
  }

  // Chunk `c` of four keys or values, `count` bytes of each.
  static inline __attribute__((always_inline)) vbytes chunk_of(const char* const* four, bool adjacent, int64_t c,
                                                               int count) {
    return adjacent ? loaded<vbytes>(four[0]) : four_runs(four, c * LANES, count);
  }

  // Adds chunk `c` of four keys to the products of GT heads with them.
  template <int GT>
  static inline __attribute__((always_inline)) void add_products(vi (&part)[GT][CUTS], vbytes both, const Head* heads,
                                                                 int64_t c) {
    const vbytes even = both & 15, odd = both >> 4;
#pragma GCC unroll 4
    for (int g = 0; g < GT; g++) {
      const vbytes* query = heads[g].codes + PARTS * c;
#pragma GCC unroll 3
      for (int cut = 0; cut < CUTS; cut++)
        part[g][cut] = dot8(part[g][cut], even, query[UNIT * cut], odd, query[UNIT * cut + 1]);
    }
  }

  // scores[g] of GT heads against the block's keys, by lane.
  template <int GT>
  static inline __attribute__((always_inline)) void score(const KeyBlock& block, const Shape& shape, const Head* heads,
                                                          vf (&scores)[GT]) {
    vf fours[GT][LANES / 4];
#pragma GCC unroll 4
    for (int k = 0; k < LANES; k += 4) {
      vi part[GT][CUTS];
#pragma GCC unroll 4
      for (int g = 0; g < GT; g++)
#pragma GCC unroll 3
        for (int cut = 0; cut < CUTS; cut++) part[g][cut] = vi{};
      int64_t c = 0;
      for (; c < shape.whole; c++)
        add_products<GT>(part, chunk_of(block.keys + k, block.adjacent, c, LANES), heads, c);
      if (c < shape.chunks) add_products<GT>(part, four_runs(block.keys + k, c * LANES, shape.rest), heads, c);
#pragma GCC unroll 4
      for (int g = 0; g < GT; g++) fours[g][k / 4] = joined(part[g]);
    }
#pragma GCC unroll 4
    for (int g = 0; g < GT; g++) {
#if defined(EXEUNT_AVX512)
      const vf sums = pair_sums(pair_sums(fours[g][0], fours[g][1]), pair_sums(fours[g][2], fours[g][3]));
#else
      const vf sums = pair_sums(fours[g][0], fours[g][1]);
#endif
      scores[g] = fused(sums * heads[g].query_step, block.key_scale, block.key_minimum * heads[g].query_sum);
    }
  }

  // One head's weights by key as bytes, four keys to a number, the lowest bytes first.
  struct Weights {
    int32_t bytes[SPAN][CUTS][LANES / 4];
    float step;

    void round(const vf (&p)[SPAN], const KeySpan& span) {
      constexpr float MOST = float((1 << 22) - 1);
      vf scaled[SPAN], most{};
      for (int b = 0; b < span.count; b++) {
        scaled[b] = p[b] * span.blocks[b].value_scale;  // never negative; NaN shows in the sum of the minimums
        most = larger(most, scaled[b]);
      }
      const float top = largest(most), inverse = top > 1e-30f ? MOST / top : 0.0f;
      step = top * (1.0f / MOST);
      for (int b = 0; b < span.count; b++) {
        vi whole = __builtin_convertvector(rounded(smaller(scaled[b] * inverse, splat(MOST))), vi);
        for (int cut = 0; cut < CUTS; cut++, whole >>= 8) {
          const vu8 low = low_bytes(whole);
          memcpy(bytes[b][cut], &low, LANES);
        }
      }
    }
  };

  // Adds one chunk of a span's values to GT heads.
  template <int GT>
  static inline __attribute__((always_inline)) void mix_chunk(const KeySpan& span, Head* heads,
                                                              const Weights* weights, int64_t c, int count) {
    vi part[GT][UNIT][CUTS];
#pragma GCC unroll 4
    for (int g = 0; g < GT; g++)
#pragma GCC unroll 3
      for (int cut = 0; cut < CUTS; cut++) part[g][0][cut] = part[g][1][cut] = vi{};
    for (int b = 0; b < span.count; b++) {
      const KeyBlock& block = span.blocks[b];
#pragma GCC unroll 2
      for (int k = 0; k < LANES; k += 8) {  // two fours of keys
        const vbytes first = interleaved(chunk_of(block.values + k, block.adjacent, c, count));
        const vbytes second = interleaved(chunk_of(block.values + k + 4, block.adjacent, c, count));
        const vbytes even[2] = {(first & 15) - 8, (second & 15) - 8}, odd[2] = {(first >> 4) - 8, (second >> 4) - 8};
#pragma GCC unroll 4
        for (int g = 0; g < GT; g++)
#pragma GCC unroll 3
          for (int cut = 0; cut < CUTS; cut++) {
            const int32_t* weight = weights[g].bytes[b][cut] + k / 4;
            const vbytes by = four_times(weight[0]), next = four_times(weight[1]);
            part[g][0][cut] = dot8(part[g][0][cut], by, even[0], next, even[1]);
            part[g][1][cut] = dot8(part[g][1][cut], by, odd[0], next, odd[1]);
          }
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < GT; g++)
#pragma GCC unroll 2
      for (int h = 0; h < UNIT; h++) {
        vf& mixed = heads[g].mixed[c * UNIT + h];
        mixed = fused(joined(part[g][h]), splat(weights[g].step), mixed);
      }
  }

  // Adds a span's values to GT heads with weights p[g] by block and lane.
  template <int GT>
  static inline __attribute__((always_inline)) void mix(const KeySpan& span, const Shape& shape, Head* heads,
                                                        const vf (&p)[GT][SPAN]) {
    Weights weights[GT];
    for (int g = 0; g < GT; g++) weights[g].round(p[g], span);
    int64_t c = 0;
    for (; c < shape.whole; c++) mix_chunk<GT>(span, heads, weights, c, LANES);
    if (c < shape.chunks) mix_chunk<GT>(span, heads, weights, c, shape.rest);
  }
};
