// Rows of logits: the most likely token and its log-probability, a draw, and how sure an exit's row is.
#pragma once

#include <limits>

#include "simd.h"
#include "threads.h"

constexpr int64_t SHARED_LOGITS = 1 << 17;  // logits from which threads pay

struct TopOfRow {
  float first, second;  // the two largest
  int64_t id;           // of the largest, the lowest among equals
  float log_total;      // log Σ exp(x - first); NaN where a value is NaN or infinite upwards, or all are -infinity
};

// log Σ exp(x - top). Callers subtract it and `top` one after the other: their sum would round to an ulp of `top`, and
// what comes out would depend on a constant added to the whole row.
inline float log_total_of(const float* x, int64_t n, float top) {
  vf total{};
  for (int64_t i = 0; i < n; i += LANES) {
    const int count = int(n - i < LANES ? n - i : LANES);
    vf term = exponential(load(x + i, count) - top);
    if (count < LANES)
      for (int l = count; l < LANES; l++) term[l] = 0;
    total += term;
  }
  return std::log(sum(total));
}

inline TopOfRow top_of_row(const float* x, int64_t n) {
  vf first = splat(-INFINITY), second = splat(-INFINITY);
  vi at{}, index;
  for (int l = 0; l < LANES; l++) index[l] = l;
  for (int64_t i = 0; i < n; i += LANES) {
    const int count = int(n - i < LANES ? n - i : LANES);
    vf v = load(x + i, count);
    if (count < LANES)
      for (int l = count; l < LANES; l++) v[l] = -INFINITY;
    const vi higher = v > first;
    second = larger(second, higher ? first : v);
    first = higher ? v : first;
    at = higher ? index : at;
    index += LANES;
  }
  TopOfRow top{-INFINITY, -INFINITY, 0, 0};
  for (int l = 0; l < LANES; l++) {
    if (first[l] > top.first || (first[l] == top.first && at[l] < top.id)) {
      top.second = top.first > top.second ? top.first : top.second;
      top.first = first[l];
      top.id = at[l];
    } else if (first[l] > top.second) {
      top.second = first[l];
    }
    if (second[l] > top.second) top.second = second[l];
  }
  top.log_total = log_total_of(x, n, top.first);
  return top;
}

// Which token of a row maximises exp((x - top) / temperature) / E, with E = -log u of the uniform u that the row's two
// keys and the token's own make: the hash is that of kernels/token_draw/reference.py. As -log u >= 1 - u, most tokens
// are out of the question before any logarithm is taken.
inline int64_t drawn_token(const float* x, int64_t n, float top, float temperature, int32_t first_key,
                           int32_t second_key, const int32_t* token_keys) {
  const float inverse = 1.0f / temperature;
  float best = -1.0f;
  int64_t id = 0;
  for (int64_t i = 0; i < n; i += LANES) {
    const int count = int(n - i < LANES ? n - i : LANES);
    vu bits{};
    memcpy(&bits, token_keys + i, size_t(count) * 4);
    bits ^= uint32_t(first_key);
    bits ^= bits >> 16;
    bits *= 0x21F0AAADu;
    bits += uint32_t(second_key);
    bits ^= bits >> 15;
    bits *= 0x735A2D97u;
    bits ^= bits >> 15;
    // u = (signed bits + 2^31 + 1/2) / 2^32, 1 - u = (left + 1/2) / 2^32
    const vu left = 0x7FFFFFFFu - bits;
    const vf weight = exponential((load(x + i, count) - top) * inverse);
    const vf room = __builtin_convertvector(left, vf) + 0.5f;
    const vi hopeful = weight * (4294967296.0f * 1.0001f) > splat(best) * room;
    for (int l = 0; l < count; l++) {
      if (!hopeful[l]) continue;
      const double uniform = (double(int32_t(bits[l])) + 2147483648.5) * (1.0 / 4294967296.0);
      const float ratio = weight[l] / float(-std::log(uniform));
      if (ratio > best) best = ratio, id = i + l;
    }
  }
  return id;
}

// For each of `rows` rows: the token that is drawn, or the most likely one where the temperature is 0, and its
// log-probability under the raw logits (NaN where they are not usable). `scores` are what is drawn from.
inline void draw_rows(int64_t* ids, float* logprobs, const float* logits, const float* scores, int64_t rows,
                      int64_t n, const float* temperatures, const int32_t* keys, const int32_t* token_keys,
                      int threads) {
  share(rows, rows * n >= SHARED_LOGITS ? threads : 1, 1, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      const float *raw = logits + r * n, *score = scores + r * n;
      const TopOfRow raw_top = top_of_row(raw, n), top = score != raw ? top_of_row(score, n) : raw_top;
      ids[r] = temperatures[r] > 0 ? drawn_token(score, n, top.first, temperatures[r], keys[2 * r], keys[2 * r + 1],
                                                 token_keys)
                                   : top.id;
      const float chosen = score[ids[r]];
      // What cannot be chosen: NaN or infinite values anywhere show in the sums, an excluded token in its score.
      const bool usable = std::isfinite(chosen) && std::isfinite(top.log_total);
      logprobs[r] = usable ? (raw[ids[r]] - raw_top.first) - raw_top.log_total : NAN;
    }
  });
}
