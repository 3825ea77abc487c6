// The small pieces between the linears, row by row: RMS norm and rotary embedding.
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

// In place over heads [heads, n]: x cos + x' sin, x' being x with its halves exchanged; cos and sin are [n], signed.
template <class T>
void rotate_heads(T* x, const T* cosines, const T* sines, int64_t heads, int64_t n) {
  const int64_t half_size = n / 2;
  for (int64_t h = 0; h < heads; h++, x += n)
    for (int64_t i = 0; i < half_size; i += LANES) {
      const int count = vector_at(i, half_size);
      T *low = x + i, *high = x + half_size + i;
      vf a = load(low, count), b = load(high, count);
      vf new_low = as_stored<T>(a * load(cosines + i, count)) + as_stored<T>(b * load(sines + i, count));
      vf new_high = as_stored<T>(b * load(cosines + half_size + i, count)) +
                    as_stored<T>(a * load(sines + half_size + i, count));
      store(low, new_low, count);
      store(high, new_high, count);
    }
}
