// y = x Wᵀ + b in full precision, W as it lies in the checkpoint: [outputs, inputs], dense.
//
// A dot product is summed in the lanes of one vector, step by step along the inputs, and the lanes by a fixed tree:
// nothing of it depends on which rows and outputs are computed together, so a row's result is the same to the bit
// alone, in a batch, as prefill or as decode. Sums are float32 in every dtype, rounded once at the end.
#pragma once

#include "simd.h"
#include "threads.h"

constexpr int OUTPUT_TILE = 4;
constexpr int FULL_ROW_TILE = LANES == 16 ? 4 : 2;
constexpr int64_t SHARED_PRODUCTS = 1 << 20;      // multiplications from which threads pay: some 40 µs of one
constexpr int64_t CACHED_ROW_BYTES = 128 << 10;   // of x that stay in the second-level cache while weights pass
constexpr int64_t CACHED_WEIGHT_BYTES = 16 << 10;  // of weights that stay in the first-level cache while rows pass
constexpr int64_t MANY_ROWS = 64;  // from which reading weights ahead pays less than having several tiles of them near

template <class T>
struct Dot {
  static constexpr int STEP = LANES;
  typedef vf value;
  static value read(const T* p, int n) { return load(p, n); }
  static vf add(vf sum, value a, value b) { return fused(a, b, sum); }
};

#if defined(EXEUNT_AVX512) && defined(__AVX512BF16__)
template <>
struct Dot<bf16> {  // pairs of products in one instruction
  static constexpr int STEP = 2 * LANES;
  typedef __m512i value;
  static value read(const bf16* p, int n) { return _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p); }
  static vf add(vf sum, value a, value b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// Lane o of the result is the sum over the lanes of part[o], o < 4.
inline vf four_sums(const vf part[OUTPUT_TILE]) {
  vf sums = pair_sums(pair_sums(part[0], part[1]), pair_sums(part[2], part[3]));
  sums = pair_sums(sums, sums);
#if defined(EXEUNT_AVX512)
  sums = pair_sums(sums, sums);
#endif
  return sums;
}

// Lane 4 r + o of the result is the sum over the lanes of part[r][o]: the tree of four_sums, of all rows at once.
inline vf tile_sums(const vf part[FULL_ROW_TILE][OUTPUT_TILE]) {
  vf row[FULL_ROW_TILE];
#pragma GCC unroll 4
  for (int r = 0; r < FULL_ROW_TILE; r++)
    row[r] = pair_sums(pair_sums(part[r][0], part[r][1]), pair_sums(part[r][2], part[r][3]));
#if defined(EXEUNT_AVX512)
  return pair_sums(pair_sums(row[0], row[1]), pair_sums(row[2], row[3]));
#else
  return pair_sums(row[0], row[1]);
#endif
}

// Adds one step's products. All indices are constants once unrolled: the sums stay in registers. FETCH: the weights of
// the tile after the next are asked for, which pays where few rows use each of them, or a tile fills the cache.
template <int ROWS, bool FETCH, class T>
inline __attribute__((always_inline)) void add_step(vf (&part)[ROWS][OUTPUT_TILE], const T* const* w, const T* x,
                                                    int64_t inputs, int64_t i, int n) {
  typedef Dot<T> D;
  typename D::value weights[OUTPUT_TILE];
#pragma GCC unroll 4
  for (int o = 0; o < OUTPUT_TILE; o++) {
    weights[o] = D::read(w[o] + i, n);
    if (FETCH) __builtin_prefetch(w[o] + i + 2 * OUTPUT_TILE * inputs, 0, 2);
#if defined(EXEUNT_AVX512)
    asm("" : "+v"(weights[o]));  // or GCC loads it again for every row
#endif
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    const typename D::value value = D::read(x + r * inputs + i, n);
#pragma GCC unroll 4
    for (int o = 0; o < OUTPUT_TILE; o++) part[r][o] = D::add(part[r][o], value, weights[o]);
  }
}

// The products of rows x, x + inputs, … with the four outputs whose weights are w, still in the lanes of `part`.
template <int ROWS, bool FETCH, class T>
inline __attribute__((always_inline)) void sum_products(vf (&part)[ROWS][OUTPUT_TILE], const T* const w[OUTPUT_TILE],
                                                        const T* x, int64_t inputs) {
  constexpr int STEP = Dot<T>::STEP;
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int o = 0; o < OUTPUT_TILE; o++) part[r][o] = vf{};
  int64_t i = 0;
  for (; i + STEP <= inputs; i += STEP) add_step<ROWS, FETCH>(part, w, x, inputs, i, STEP);
  if (i < inputs) add_step<ROWS, FETCH>(part, w, x, inputs, i, int(inputs - i));
}

template <class T>
struct FullLinear {
  const T *weight, *bias;  // bias may be null
  int64_t inputs, outputs;
  const T* x;
  T* y;

  struct Outputs {
    int64_t first;
    int count;
    const T* w[OUTPUT_TILE];  // past the last output: the last one again, not stored
  };

  Outputs tile(int64_t number) const {
    Outputs at;
    at.first = number * OUTPUT_TILE;
    at.count = int(outputs - at.first < OUTPUT_TILE ? outputs - at.first : OUTPUT_TILE);
    for (int o = 0; o < OUTPUT_TILE; o++) at.w[o] = weight + (at.first + (o < at.count ? o : at.count - 1)) * inputs;
    return at;
  }

  void put_sums(const float* sums, int64_t row, const Outputs& at) const {
    T* out = y + row * outputs + at.first;
    if (bias == nullptr && sizeof(T) == 4 && at.count == OUTPUT_TILE) {
      memcpy((void*)out, sums, OUTPUT_TILE * sizeof(float));
      return;
    }
    for (int o = 0; o < at.count; o++) put(out + o, bias ? sums[o] + to_float(bias[at.first + o]) : sums[o]);
  }

  template <int ROWS>
  void write(int64_t row, const Outputs& at) const {
    vf part[ROWS][OUTPUT_TILE];
    sum_products<ROWS, true>(part, at.w, x + row * inputs, inputs);
    for (int r = 0; r < ROWS; r++) {
      const vf sums = four_sums(part[r]);
      put_sums((const float*)&sums, row + r, at);
    }
  }

  template <bool FETCH>
  void write_tile(int64_t row, const Outputs& at) const {
    vf part[FULL_ROW_TILE][OUTPUT_TILE];
    sum_products<FULL_ROW_TILE, FETCH>(part, at.w, x + row * inputs, inputs);
    const vf sums = tile_sums(part);
    for (int r = 0; r < FULL_ROW_TILE; r++) put_sums((const float*)&sums + OUTPUT_TILE * r, row + r, at);
  }

  // Rows `row` to `last` - 1 against the tiles `from` to `to` - 1, whose weights stay near while the rows pass.
  template <bool FETCH>
  void write_rows(int64_t row, int64_t last, int64_t from, int64_t to) const {
    for (; row + FULL_ROW_TILE <= last; row += FULL_ROW_TILE)
      for (int64_t t = from; t < to; t++) write_tile<FETCH>(row, tile(t));
    for (int64_t t = from; t < to; t++) {
      if (last - row == 1) write<1>(row, tile(t));
      if (FULL_ROW_TILE > 2 && last - row == 2) write<2>(row, tile(t));
      if (FULL_ROW_TILE > 2 && last - row == 3) write<3>(row, tile(t));
    }
  }
};

template <class T>
void full_linear(T* y, const T* x, int64_t rows, const T* weight, int64_t inputs, int64_t outputs, const T* bias,
                 int threads) {
  const FullLinear<T> work{weight, bias, inputs, outputs, x, y};
  const int64_t tiles = (outputs + OUTPUT_TILE - 1) / OUTPUT_TILE, row_bytes = inputs * int64_t(sizeof(T));
  int64_t together = CACHED_ROW_BYTES / row_bytes / FULL_ROW_TILE * FULL_ROW_TILE;
  if (together < 2 * FULL_ROW_TILE) together = 2 * FULL_ROW_TILE;
  int64_t near = CACHED_WEIGHT_BYTES / (row_bytes * OUTPUT_TILE);
  near = near < 1 ? 1 : near;
  const bool parallel = rows * inputs * outputs >= SHARED_PRODUCTS, many = rows > MANY_ROWS && near > 1;
  const int64_t piece = rows <= together ? (tiles / (4 * threads) + 4) / 4 * 4 : 8;
  share(tiles, parallel ? threads : 1, piece, [&](int64_t first, int64_t last) {
    // Few tiles at a time, so that their weights are still near when the next rows come.
    for (int64_t part = first; part < last; part += 8)
      for (int64_t row = 0; row < rows; row += together)
        for (int64_t from = part; from < last && from < part + 8; from += near) {
          const int64_t end = row + together < rows ? row + together : rows, stop = part + 8 < last ? part + 8 : last;
          const int64_t to = from + near < stop ? from + near : stop;
          if (many)
            work.template write_rows<false>(row, end, from, to);
          else
            work.template write_rows<true>(row, end, from, to);
        }
  });
}
