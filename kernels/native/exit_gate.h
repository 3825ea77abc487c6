// Which rows leave at an exit: the probe screens all, the projection of those that pass decides.
#pragma once

#include <type_traits>

#include "draw.h"
#include "exit_state.h"

// The struct is that of kernels/exit_gate/gate.py, field by field.
struct Gate {
  ExitWeights weights;
  Matrix output;         // [outputs, size], what the head's state is projected with
  const float* combine;  // [4]
  double screen_ratio, least_doubt;
};

struct Decisions {  // by row, and by projected row in ascending order
  float* confidence;   // [rows], 0 where a row is not projected
  bool* leaves;        // [rows]
  int64_t* projected;  // [rows] row numbers, the first as many as the result of `exit_gate` says
  float* logits;       // [rows, outputs] of the projected ones, dense from the first on
};

// The rows whose probe lets them pass, their states and probes moved to the front.
template <class T>
int64_t screened(T* state, float* probe, int64_t* passing, const float* thresholds, const Gate& gate, int64_t rows) {
  const int64_t n = gate.weights.size;
  int64_t kept = 0;
  for (int64_t r = 0; r < rows; r++) {
    // 0 times an infinite threshold is NaN, and a row with it never passes
    if (!(1.0f / (1.0f + std::exp(-probe[r])) >= thresholds[r] * float(gate.screen_ratio))) continue;
    if (kept != r) memcpy(state + kept * n, state + r * n, size_t(n) * sizeof(T));
    probe[kept] = probe[r];
    passing[kept++] = r;
  }
  return kept;
}

// Decides for x [rows, size] with thresholds [rows]; returns how many rows were projected. Scratch: a row 2 * size values
// of T, and `outputs` more where T is not float, and size + units + 2 floats.
template <class T>
int64_t exit_gate(const Decisions& out, const T* x, const float* thresholds, const Gate& gate, int64_t rows,
                  T* scratch, float* wide, int threads) {
  const int64_t n = gate.weights.size, outputs = gate.output.outputs;
  T *state = scratch + rows * n, *product = state + rows * n;
  float *probe = wide + rows * (n + gate.weights.units), *sure = probe + rows;
  exit_state(state, probe, x, gate.weights, rows, scratch, wide, threads);
  for (int64_t r = 0; r < rows; r++) out.confidence[r] = 0, out.leaves[r] = false;
  const int64_t kept = screened(state, probe, out.projected, thresholds, gate, rows);
  if (kept == 0) return 0;
  if constexpr (std::is_same<T, float>::value) {
    matrix_product(gate.output, state, out.logits, kept, 0, threads);
  } else {
    matrix_product(gate.output, state, product, kept, 0, threads);
    for (int64_t i = 0; i < kept * outputs; i += LANES) {
      const int count = vector_at(i, kept * outputs);
      store(out.logits + i, load(product + i, count), count);
    }
  }
  gate_confidence(sure, out.logits, probe, gate.combine, kept, outputs, float(gate.least_doubt), threads);
  for (int64_t k = 0; k < kept; k++) {
    const int64_t r = out.projected[k];
    out.confidence[r] = sure[k];
    out.leaves[r] = sure[k] >= thresholds[r];
  }
  return kept;
}
