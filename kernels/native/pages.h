// Where keys and values lie, as Python hands it over: arrays of int64 (see kernels/native/descriptors.py).
#pragma once

#include "simd.h"

struct PagedTensor {  // [pages, kv_heads, page_tokens, n], the last dimension dense
  char* data;
  int64_t page, head, token;  // strides, bytes
  char* at(int64_t p, int64_t h, int64_t t) const { return data + p * page + h * head + t * token; }
};

struct Pages {
  PagedTensor keys, values, key_params, value_params;  // params: null data in the full format
  int64_t page_tokens, kv_heads, head_dim;
  bool int4() const { return key_params.data != nullptr; }
};

struct Batch {
  const int64_t* positions;     // [tokens]
  const int32_t* query_starts;  // [rows + 1]
  const int32_t* page_tables;   // [rows, table_width]
  int64_t rows, table_width, max_context;

  int64_t row_of(int64_t token) const {
    int64_t low = 0, high = rows;  // query_starts[low] <= token < query_starts[high]
    while (high - low > 1) {
      int64_t middle = (low + high) / 2;
      (query_starts[middle] <= token ? low : high) = middle;
    }
    return low;
  }
};

// ---- the Hadamard rotation: butterflies of strides 1, 2, 4, … within blocks, then 1 / √block -----------------

inline vf flipped(vf v, int bit) {  // the sign of lanes whose index has `bit`
  vi sign{};
  for (int i = 0; i < LANES; i++) sign[i] = i & bit ? INT32_MIN : 0;
  return (vf)((vi)v ^ sign);
}

// `x` holds n values, zero up to the next multiple of LANES.
inline void rotate(vf* x, int64_t n) {
  const int64_t block = n & -n, vectors = (n + LANES - 1) / LANES;
  for (int64_t i = 0; i < vectors; i++) {
    vf v = x[i];
    if (block > 1) v = swap1(v) + flipped(v, 1);
    if (block > 2) v = swap2(v) + flipped(v, 2);
    if (block > 4) v = swap4(v) + flipped(v, 4);
#if defined(EXEUNT_AVX512)
    if (block > 8) v = swap8(v) + flipped(v, 8);
#endif
    x[i] = v;
  }
  for (int64_t stride = 1; stride < block / LANES; stride *= 2)
    for (int64_t i = 0; i < vectors; i++)
      if (!(i & stride)) {
        vf low = x[i], high = x[i + stride];
        x[i] = low + high;
        x[i + stride] = low - high;
      }
  const float scale = float(1.0 / std::sqrt(double(block)));
  for (int64_t i = 0; i < vectors; i++) x[i] = x[i] * scale;
}

template <class T>
void load_padded(vf* out, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) out[i / LANES] = load(x + i, int(n - i < LANES ? n - i : LANES));
}
