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

// Adds one step's products. All indices are constants once unrolled: the sums stay in registers.
template <int ROWS, class T>
inline __attribute__((always_inline)) void add_step(vf (&part)[ROWS][OUTPUT_TILE], const T* const* w, const T* x,
                                                    int64_t inputs, int64_t i, int n) {
  typedef Dot<T> D;
  typename D::value weights[OUTPUT_TILE];
#pragma GCC unroll 4
  for (int o = 0; o < OUTPUT_TILE; o++) {
    weights[o] = D::read(w[o] + i, n);
    __builtin_prefetch(w[o] + i + 2 * OUTPUT_TILE * inputs, 0, 2);  // the tile after the next
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

// Rows x, x + inputs, … against the four outputs whose weights are w.
template <int ROWS, class T>
void four_outputs(const T* const w[OUTPUT_TILE], const T* x, int64_t inputs, vf out[ROWS]) {
  constexpr int STEP = Dot<T>::STEP;
  vf part[ROWS][OUTPUT_TILE];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int o = 0; o < OUTPUT_TILE; o++) part[r][o] = vf{};
  int64_t i = 0;
  for (; i + STEP <= inputs; i += STEP) add_step<ROWS>(part, w, x, inputs, i, STEP);
  if (i < inputs) add_step<ROWS>(part, w, x, inputs, i, int(inputs - i));
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) out[r] = four_sums(part[r]);
}

template <class T>
struct FullLinear {
  const T *weight, *bias;  // bias may be null
  int64_t inputs, outputs;
  const T* x;
  T* y;

  template <int ROWS>
  void write(int64_t row, int64_t first) const {
    const int count = int(outputs - first < OUTPUT_TILE ? outputs - first : OUTPUT_TILE);
    const T* w[OUTPUT_TILE];  // past the last output: the last one again, not stored
    for (int o = 0; o < OUTPUT_TILE; o++) w[o] = weight + (first + (o < count ? o : count - 1)) * inputs;
    vf out[ROWS];
    four_outputs<ROWS>(w, x + row * inputs, inputs, out);
    for (int r = 0; r < ROWS; r++) {
      if (bias) out[r] += load(bias + first, count);
      for (int o = 0; o < count; o++) put(y + (row + r) * outputs + first + o, out[r][o]);
    }
  }

  void write_rows(int64_t row, int64_t last, int64_t first) const {
    for (; row + FULL_ROW_TILE <= last; row += FULL_ROW_TILE) write<FULL_ROW_TILE>(row, first);
    if (last - row == 1) write<1>(row, first);
    if (FULL_ROW_TILE > 2 && last - row == 2) write<2>(row, first);
    if (FULL_ROW_TILE > 2 && last - row == 3) write<3>(row, first);
  }
};

template <class T>
void full_linear(T* y, const T* x, int64_t rows, const T* weight, int64_t inputs, int64_t outputs, const T* bias,
                 int threads) {
  const FullLinear<T> work{weight, bias, inputs, outputs, x, y};
  const int64_t tiles = (outputs + OUTPUT_TILE - 1) / OUTPUT_TILE;
  int64_t together = CACHED_ROW_BYTES / int64_t(sizeof(T)) / inputs / FULL_ROW_TILE * FULL_ROW_TILE;
  if (together < 2 * FULL_ROW_TILE) together = 2 * FULL_ROW_TILE;
  const bool parallel = rows * inputs * outputs >= SHARED_PRODUCTS;
  const int64_t piece = rows <= together ? (tiles / (4 * threads) + 4) / 4 * 4 : 8;
  share(tiles, parallel ? threads : 1, piece, [&](int64_t first, int64_t last) {
    // Few tiles at a time, so that their weights are still near when the next rows come.
    for (int64_t from = first; from < last; from += 8)
      for (int64_t row = 0; row < rows; row += together)
        for (int64_t tile = from; tile < last && tile < from + 8; tile++)
          work.write_rows(row, row + together < rows ? row + together : rows, tile * OUTPUT_TILE);
  });
}
