// The small pieces between the linears, row by row: RMS norm, rotary embedding, gated SiLU.
//
// In 16 bits every product is rounded where PyTorch's own operations would round it.
#pragma once

#include "simd.h"

template <class T>
inline vf as_stored(vf v) {  // what is left of v once it was stored as T
  if (sizeof(T) == 4) return v;
  T stored[LANES];
  store(stored, v, LANES);
  return load(stored, LANES);
}

inline int vector_at(int64_t i, int64_t n) { return int(n - i < LANES ? n - i : LANES); }

// y = x / √(mean x² + eps) × weight, x with `stride` elements between rows.
template <class T>
void rms_norm(T* y, const T* x, const T* weight, int64_t rows, int64_t n, int64_t stride, float eps) {
  for (int64_t r = 0; r < rows; r++, x += stride, y += n) {
    vf squares{};
    for (int64_t i = 0; i < n; i += LANES) {
      vf v = load(x + i, vector_at(i, n));
      squares = fused(v, v, squares);
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / float(n) + eps);
    for (int64_t i = 0; i < n; i += LANES) {
      const int count = vector_at(i, n);
      store(y + i, as_stored<T>(load(x + i, count) * scale) * load(weight + i, count), count);
    }
  }
}

// y = silu(gate) × up for rows [gate | up] of 2 n values.
template <class T>
void silu_mul(T* y, const T* x, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; r++, x += 2 * n, y += n)
    for (int64_t i = 0; i < n; i += LANES) {
      const int count = vector_at(i, n);
      vf gate = load(x + i, count), power = -gate;
      power = power > 88.0f ? splat(88.0f) : power;
      vf active = as_stored<T>(gate / (exponential(power) + 1.0f));
      store(y + i, active * load(x + n + i, count), count);
    }
}

// In place over heads of n values: x cos + x' sin, x' being x with its halves exchanged; cos and sin are [tokens, n]
// with `table_stride` between tokens, the sines signed.
template <class T>
void rotate_heads(T* x, const T* cosines, const T* sines, int64_t tokens, int64_t heads, int64_t n,
                  int64_t stride, int64_t table_stride) {
  const int64_t half_size = n / 2;
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t h = 0; h < heads; h++) {
      T *low = x + t * stride + h * n, *high = low + half_size;
      const T *c = cosines + t * table_stride, *s = sines + t * table_stride;
      for (int64_t i = 0; i < half_size; i += LANES) {
        const int count = vector_at(i, half_size);
        vf a = load(low + i, count), b = load(high + i, count);
        vf new_low = as_stored<T>(a * load(c + i, count)) + as_stored<T>(b * load(s + i, count));
        vf new_high = as_stored<T>(b * load(c + half_size + i, count)) +
                      as_stored<T>(a * load(s + half_size + i, count));
        store(low + i, new_low, count);
        store(high + i, new_high, count);
      }
    }
}
