// What an exit reads off hidden states: the head's state, and the probe's logit of it.
#pragma once

#include "blocks.h"

// The struct is that of kernels/exit_gate/dispatch.py, field by field.
struct ExitWeights {
  const void *norm, *norm_bias, *adapter;  // in the model's dtype; norm_bias null for an RMS norm
  const float *hidden, *hidden_bias, *output, *output_bias;  // the probe, float32
  int64_t size, units, layer_norm;
  double eps;
};

// state [rows, size] = n + A n with n = norm(x); logits [rows]. Scratch: size values of T and size + units floats a row;
// behind the first rows * size of these stand the probe's units [rows, units] before their activation.
template <class T>
void exit_state(T* state, float* logits, const T* x, const ExitWeights& w, int64_t rows, T* scratch, float* wide,
                int threads) {
  const int64_t n = w.size;
  for (int64_t r = 0; r < rows; r++) {
    const T *from = x + r * n, *norm = (const T*)w.norm;
    if (w.layer_norm)
      layer_norm(scratch + r * n, from, norm, (const T*)w.norm_bias, n, float(w.eps));
    else
      rms_norm(scratch + r * n, from, norm, 1, n, n, float(w.eps));
  }
  full_linear(state, scratch, rows, (const T*)w.adapter, n, n, (const T*)nullptr, threads);
  float* units = wide + rows * n;
  for (int64_t i = 0; i < rows * n; i += LANES) {
    const int count = vector_at(i, rows * n);
    store(state + i, load(scratch + i, count) + load(state + i, count), count);
    store(wide + i, load(state + i, count), count);
  }
  full_linear(units, wide, rows, w.hidden, n, w.units, w.hidden_bias, threads);
  for (int64_t r = 0; r < rows; r++) {
    vf total{};
    for (int64_t i = 0; i < w.units; i += LANES) {
      const int count = vector_at(i, w.units);
      total = fused(activated(load(units + r * w.units + i, count), GELU), load(w.output + i, count), total);
    }
    logits[r] = sum(total) + *w.output_bias;
  }
}
