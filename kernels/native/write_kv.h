// Keys and values into their slots: copied, or rotated (keys), quantised per token and head, and packed.
#pragma once

#include <vector>

#include "pages.h"
#include "threads.h"

constexpr int64_t SHARED_VALUES = 1 << 16;  // values from which threads pay

// codes: n / 2 bytes, params: (scale, minimum). `x` holds n values padded to whole vectors. The arithmetic is that of
// round_groups in kernels/int4_linear/weight.py, operation by operation: both give the same bits.
inline void quantise_head(vf* x, int64_t n, uint8_t* codes, half* params) {
  float* value = (float*)x;
  const int64_t vectors = (n + LANES - 1) / LANES;
  for (int64_t i = n; i < vectors * LANES; i++) value[i] = value[0];
  vf low = x[0], high = x[0], odd{};
  for (int64_t i = 0; i < vectors; i++) {
    low = smaller(x[i], low);
    high = larger(x[i], high);
    odd += x[i] - x[i];  // NaN where a value is not finite
  }
  float least = -largest(-low), most = largest(high);
  least = least < -65504.0f ? -65504.0f : least;
  most = most > 65504.0f ? 65504.0f : most;
  float scale = (most - least) / 15.0f;
  if (sum(odd) != 0.0f) scale = least = NAN;
  put(params, scale > 65504.0f ? 65504.0f : scale);
  put(params + 1, least);
  const float step = to_float(params[0]), offset = to_float(params[1]);
  const float inverse = step > 0 ? 1.0f / step : 0.0f;
  uint8_t wide[LANES];
  for (int64_t i = 0; i < vectors; i++) {
    vf code = larger(smaller(rounded((x[i] - offset) * inverse), splat(15.0f)), splat(0.0f));
    vu8 narrow = __builtin_convertvector(__builtin_convertvector(code, vi), vu8);
    memcpy(wide, &narrow, LANES);
    int64_t bytes = (n - i * LANES < LANES ? n - i * LANES : LANES) / 2;
    for (int64_t j = 0; j < bytes; j++) codes[i * LANES / 2 + j] = uint8_t(wide[2 * j] | wide[2 * j + 1] << 4);
  }
}

template <class T>
void write_kv(const Pages& pages, const T* keys, const T* values, int64_t key_stride, int64_t value_stride,
              const int64_t* slots, int64_t tokens, int threads) {
  const int64_t n = pages.head_dim, heads = pages.kv_heads, vectors = (n + LANES - 1) / LANES;
  auto write = [&](int64_t first, int64_t last) {
    std::vector<vf> x(static_cast<size_t>(pages.int4() ? vectors : 0));
    for (int64_t t = first; t < last; t++) {
      const int64_t page = slots[t] / pages.page_tokens, place = slots[t] % pages.page_tokens;
      for (int64_t h = 0; h < heads; h++) {
        const T *key = keys + t * key_stride + h * n, *value = values + t * value_stride + h * n;
        if (!pages.int4()) {
          memcpy(pages.keys.at(page, h, place), key, size_t(n) * sizeof(T));
          memcpy(pages.values.at(page, h, place), value, size_t(n) * sizeof(T));
          continue;
        }
        load_padded(x.data(), key, n);
        rotate(x.data(), n);
        quantise_head(x.data(), n, (uint8_t*)pages.keys.at(page, h, place),
                      (half*)pages.key_params.at(page, h, place));
        load_padded(x.data(), value, n);
        quantise_head(x.data(), n, (uint8_t*)pages.values.at(page, h, place),
                      (half*)pages.value_params.at(page, h, place));
      }
    }
  };
  share(tokens, tokens * heads * n >= SHARED_VALUES ? threads : 1, 16, write);
}
