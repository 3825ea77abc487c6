// y = x Wᵀ + b with W in INT4 panels and x rounded to INT8 per row and group on the way in.
//
// A panel holds LANES outputs. Group by group it stores LANES float16 scales, LANES float16 offsets, and for every
// 8 inputs LANES × 4 bytes: byte j of output o holds input j in its low nibble and input 4 + j in its high one.
// Groups are padded to a multiple of 8 inputs with code 0. With x ≈ s q (q in -127 .. 127, s = max|x| / 127 of the
// group) and w = c t + o, a group adds  s t Σ c q + o s Σ q:  the sums of integers are exact, and the two products
// are added group after group. No step of it depends on how many rows or outputs are computed together.
#pragma once

#include <vector>

#include "byte_dots.h"
#include "threads.h"

constexpr int ROW_TILE = 4;              // rows that share one unpacking of the weights
constexpr int64_t SCRATCH_ROWS = 256;    // rows quantised at once
constexpr int64_t STEP_INPUTS = 8;       // inputs of one byte vector
constexpr int64_t STEP_BYTES = LANES * 4;
constexpr int64_t SHARED_WORK = 1 << 22;     // multiplications from which threads pay: some 40 µs of one
constexpr int64_t SHARED_INPUTS = 1 << 18;   // inputs from which quantising them is shared

struct Groups {  // how the inputs are cut
  int64_t inputs, size, count;
  int64_t length(int64_t g) const { return g + 1 < count ? size : inputs - g * size; }
  int64_t steps(int64_t g) const { return (length(g) + STEP_INPUTS - 1) / STEP_INPUTS; }
  int64_t padded() const { return ((count - 1) * steps(0) + steps(count - 1)) * STEP_INPUTS; }
  int64_t panel_bytes() const { return count * LANES * 4 + padded() / STEP_INPUTS * STEP_BYTES; }
};

struct QuantisedRows {  // scratch that one thread keeps between calls
  std::vector<int8_t> codes;  // [rows, padded]
  std::vector<float> scales;  // [rows, groups] s
  std::vector<float> sums;    // [rows, groups] s Σ q
};

template <class T>
void quantise_group(const T* x, int64_t n, int8_t* codes, int64_t padded, float* scale, float* sum) {
  vi sizes{};
  for (int64_t i = 0; i < n; i += LANES) sizes = with_sizes(sizes, load(x + i, int(n - i < LANES ? n - i : LANES)));
  const float size = largest_size(sizes);
  memset(codes, 0, size_t(padded));
  if (!(size >= 1e-30f)) {  // nothing here, or NaN: which must come out as NaN
    *scale = *sum = size == size ? 0.0f : size;
    return;
  }
  float inverse = 127.0f / size;
  vi total{};
  for (int64_t i = 0; i < n; i += LANES) {
    int count = int(n - i < LANES ? n - i : LANES);
    vi q = __builtin_convertvector(rounded(load(x + i, count) * inverse), vi);
    vi8 narrow = __builtin_convertvector(q, vi8);
    memcpy(codes + i, &narrow, size_t(count));
    total += q;
  }
  int32_t whole = 0;
  for (int i = 0; i < LANES; i++) whole += total[i];
  *scale = size * (1.0f / 127.0f);
  *sum = *scale * float(whole);
}

template <class T>
void quantise_row(const T* x, const Groups& groups, int8_t* codes, float* scales, float* sums) {
  for (int64_t g = 0; g < groups.count; g++) {
    int64_t padded = groups.steps(g) * STEP_INPUTS;
    quantise_group(x + g * groups.size, groups.length(g), codes, padded, scales + g, sums + g);
    codes += padded;
  }
}

// ROWS × PANELS outputs; `panel` is the first panel, the others follow every panel_bytes.
template <int ROWS, int PANELS>
void tile(const uint8_t* panel, const Groups& groups, const int8_t* codes, const float* scales,
          const float* sums, vf out[ROWS][PANELS]) {
  const int64_t panel_bytes = groups.panel_bytes(), row_bytes = groups.padded();
  for (int r = 0; r < ROWS; r++)
    for (int p = 0; p < PANELS; p++) out[r][p] = vf{};
  for (int64_t g = 0; g < groups.count; g++) {
    const uint8_t* packed = panel + LANES * 4;
    const int64_t steps = groups.steps(g);
    vi dots[ROWS][PANELS] = {};
    for (int64_t s = 0; s < steps; s++) {
      for (int p = 0; p < PANELS; p++) {
        vbytes both = loaded<vbytes>(packed + s * STEP_BYTES + p * panel_bytes);
        vbytes low = both & 15, high = both >> 4;
        for (int r = 0; r < ROWS; r++) {
          int32_t q[2];
          memcpy(q, codes + r * row_bytes + s * STEP_INPUTS, 8);
          dots[r][p] = dot8(dots[r][p], low, four_times(q[0]), high, four_times(q[1]));
        }
      }
    }
    for (int p = 0; p < PANELS; p++) {
      vf steps_of = load((const half*)(panel + p * panel_bytes), LANES);
      vf offsets = load((const half*)(panel + p * panel_bytes) + LANES, LANES);
      for (int r = 0; r < ROWS; r++) {
        vf scaled = __builtin_convertvector(dots[r][p], vf) * scales[r * groups.count + g];
        out[r][p] = fused(scaled, steps_of, out[r][p]);
        out[r][p] = fused(splat(sums[r * groups.count + g]), offsets, out[r][p]);
      }
    }
    panel = packed + steps * STEP_BYTES;
    codes += steps * STEP_INPUTS;
  }
}

template <class T>
struct Int4Linear {
  const uint8_t* panels;
  Groups groups;
  int64_t outputs;
  const T* bias;  // or null
  T* y;           // [rows, outputs]
  const QuantisedRows* x;

  template <int ROWS, int PANELS>
  void write(int64_t row, int64_t panel) const {
    vf out[ROWS][PANELS];
    tile<ROWS, PANELS>(panels + panel * groups.panel_bytes(), groups, x->codes.data() + row * groups.padded(),
                       x->scales.data() + row * groups.count, x->sums.data() + row * groups.count, out);
    for (int p = 0; p < PANELS; p++) {
      int64_t first = (panel + p) * LANES;
      int n = int(outputs - first < LANES ? outputs - first : LANES);
      for (int r = 0; r < ROWS; r++) {
        vf v = bias ? out[r][p] + load(bias + first, n) : out[r][p];
        store(y + (row + r) * outputs + first, v, n);
      }
    }
  }

  template <int ROWS>
  void write_panels(int64_t row, int64_t first, int64_t last) const {
    constexpr int WIDE = LANES == 16 ? (ROWS <= 2 ? 4 : 2) : (ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1);
    int64_t panel = first;
    for (; panel + WIDE <= last; panel += WIDE) write<ROWS, WIDE>(row, panel);
    for (; panel < last; panel++) write<ROWS, 1>(row, panel);
  }

  void write_rows(int64_t rows, int64_t first, int64_t last) const {
    int64_t row = 0;
    for (; row + ROW_TILE <= rows; row += ROW_TILE) write_panels<ROW_TILE>(row, first, last);
    if (rows - row == 1) write_panels<1>(row, first, last);
    if (rows - row == 2) write_panels<2>(row, first, last);
    if (rows - row == 3) write_panels<3>(row, first, last);
  }
};

template <class T>
void int4_linear(T* y, const T* x, int64_t rows, const uint8_t* panels, Groups groups, int64_t outputs,
                 const T* bias, int threads) {
  static thread_local QuantisedRows scratch;
  QuantisedRows& q = scratch;  // the caller's, not each worker's
  int64_t held = rows < SCRATCH_ROWS ? rows : SCRATCH_ROWS;
  q.codes.resize(size_t(held * groups.padded()));
  q.scales.resize(size_t(held * groups.count));
  q.sums.resize(size_t(held * groups.count));
  const int64_t count = (outputs + LANES - 1) / LANES;
  for (; rows > 0; rows -= held, x += held * groups.inputs, y += held * outputs) {
    held = held < rows ? held : rows;
    share(held, held * groups.inputs >= SHARED_INPUTS ? threads : 1, 16, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; r++)
        quantise_row(x + r * groups.inputs, groups, q.codes.data() + r * groups.padded(),
                     q.scales.data() + r * groups.count, q.sums.data() + r * groups.count);
    });
    Int4Linear<T> work{panels, groups, outputs, bias, y, &q};
    // Many rows: few panels at a time, so that they stay in the first-level cache while all rows pass over them.
    int64_t step = held <= ROW_TILE ? count : 4;
    int64_t piece = held <= ROW_TILE ? (count / (4 * threads) + 4) / 4 * 4 : 4;
    bool parallel = held * groups.padded() * outputs >= SHARED_WORK;
    share(count, parallel ? threads : 1, piece, [&](int64_t first, int64_t last) {
      for (int64_t panel = first; panel < last; panel += step)
        work.write_rows(held, panel, panel + step < last ? panel + step : last);
    });
  }
}
