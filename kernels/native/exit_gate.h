// Which rows leave at an exit: the probe screens all, and a projection of those that pass decides. Where that is onto a
// shortlist, only rows that it lets go are projected onto the whole vocabulary, whose logits may have the last word.
#pragma once

#include <type_traits>

#include "draw.h"
#include "exit_state.h"

constexpr int MOST_TOPS = 16;  // the most log-probabilities that a judge sees

// The structs are those of kernels/exit_gate/gate.py, field by field.
struct Judge {  // the probe's second opinion, once the largest log-probabilities are known
  const float* tops;  // [count, units], what each of them, largest first, adds to the probe's units; null: no judge
  const float *hidden_bias, *output, *output_bias;  // [units], [units], [1]
  int64_t units, count;
};

struct Confirmation {  // what decides, by all logits, about rows that the shortlist lets pass
  Judge judge;
  const float* combine;  // [4]; null: there is none, and the shortlist decides
  double list_ratio;     // of its threshold, the confidence that a row needs by the shortlist to be asked about
};

struct Gate {
  ExitWeights weights;
  Matrix output;     // [outputs, size], what the head's state is projected with
  Matrix shortlist;  // a few rows of it, which are looked at first; none of them: the whole of it is
  Judge judge;
  const float* combine;  // [4]
  double screen_ratio, least_doubt;
  Confirmation confirmation;
};

struct Decisions {  // by row, and by rows looked at, projected or leaving in ascending order
  float* confidence;  // [rows], 0 where a row is not looked at
  bool* leaves;       // [rows]
  int64_t* looked;    // [rows] numbers of the rows that were looked at, the first as many as `exit_gate` says
  int64_t* whole;     // [rows] the same of rows that were projected onto the whole vocabulary
  float* logits;      // [rows, outputs] of the rows that leave, dense from the first on
};

struct Counts {
  int64_t looked, whole, left;
};

// The `count` largest of x [n], descending. Runs in which nothing is larger than the least of them are passed at once.
// Where a value is NaN they need not be found: the row's sum is NaN then, and with it whatever comes of it.
inline void largest_of(const float* x, int64_t n, int64_t count, float* best) {
  constexpr int64_t RUN = 8 * LANES;
  for (int64_t k = 0; k < count; k++) best[k] = -INFINITY;
  for (int64_t i = 0; i < n; i += RUN) {
    const int64_t end = i + RUN < n ? i + RUN : n;
    if (end - i == RUN) {
      vf most = load(x + i, LANES);
      for (int64_t j = i + LANES; j < end; j += LANES) most = larger(most, load(x + j, LANES));
      if (!(largest(most) > best[count - 1])) continue;
    }
    for (int64_t at = i; at < end; at += LANES) {
      const int64_t stop = at + LANES < end ? at + LANES : end;
      if (stop - at == LANES && !(largest(load(x + at, LANES)) > best[count - 1])) continue;
      for (int64_t j = at; j < stop; j++) {
        if (!(x[j] > best[count - 1])) continue;
        int64_t k = count - 1;
        for (; k > 0 && best[k - 1] < x[j]; k--) best[k] = best[k - 1];
        best[k] = x[j];
      }
    }
  }
}

// The judge's logit for a row: its probe's units [units] before their activation, and the row's logits x [n].
inline float judged(const Judge& judge, const float* units, const float* x, int64_t n, const TopOfRow& top) {
  float best[MOST_TOPS];
  largest_of(x, n, judge.count, best);
  for (int64_t k = 0; k < judge.count; k++) best[k] = (best[k] - top.first) - top.log_total;
  vf total{};
  for (int64_t i = 0; i < judge.units; i += LANES) {
    const int count = vector_at(i, judge.units);
    vf unit = load(units + i, count) + load(judge.hidden_bias + i, count);
    for (int64_t k = 0; k < judge.count; k++)
      unit = fused(splat(best[k]), load(judge.tops + k * judge.units + i, count), unit);
    total = fused(activated(unit, GELU), load(judge.output + i, count), total);
  }
  return sum(total) + *judge.output_bias;
}

// The probability that an exit's top token is the full model's, by rows [rows, n] of its logits: logistic regression
// over the judge's logit (the probe's, where there is no judge), the log-odds of the top probability and the margin
// (kernels/exit_gate/reference.py). `units` [rows, judge.units] are read by the judge alone.
inline void gate_confidence(float* out, const float* logits, const float* probe, const float* units,
                            const Judge& judge, const float* weights, int64_t rows, int64_t n, float least_doubt,
                            int threads) {
  share(rows, rows * n >= SHARED_LOGITS ? threads : 1, 1, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      const float* x = logits + r * n;
      const TopOfRow top = top_of_row(x, n);
      float log_p = -top.log_total;
      if (log_p > least_doubt) log_p = least_doubt;
      const float odds = log_p - std::log(-std::expm1(log_p));
      const float opinion = judge.tops ? judged(judge, units + r * judge.units, x, n, top) : probe[r];
      const float logit = weights[0] * opinion + weights[1] * odds + weights[2] * (top.first - top.second) + weights[3];
      out[r] = 1.0f / (1.0f + std::exp(-logit));
    }
  });
}

// What is known of rows that are still in question, dense from the first on.
template <class T>
struct Candidates {
  T* state;      // [rows, size]
  float* probe;  // [rows], its logit
  float* units;  // [rows, width]
  int64_t size, width;

  // Moves what is known of candidate `from` to the place of candidate `to`.
  void move(int64_t to, int64_t from) const {
    if (to == from) return;
    memcpy(state + to * size, state + from * size, size_t(size) * sizeof(T));
    memcpy(units + to * width, units + from * width, size_t(width) * sizeof(float));
    probe[to] = probe[from];
  }
};

// Keeps the candidates that `passes(their place, their row)`; returns how many, their rows' numbers in `kept`. The
// candidates' rows are `rows` [count], null where they are the first rows themselves.
template <class T, class Passes>
int64_t keep(int64_t* kept, const int64_t* rows, int64_t count, const Candidates<T>& candidates, const Passes& passes) {
  int64_t found = 0;
  for (int64_t k = 0; k < count; k++) {
    const int64_t row = rows ? rows[k] : k;
    if (!passes(k, row)) continue;
    candidates.move(found, k);
    kept[found++] = row;
  }
  return found;
}

// Logits [rows, outputs] float32 of states [rows, size]; `product` is scratch of that size where T is not float.
template <class T>
void project(float* logits, const Matrix& output, const T* state, int64_t rows, T* product, int threads) {
  if constexpr (std::is_same<T, float>::value) {
    matrix_product(output, state, logits, rows, 0, threads);
  } else {
    matrix_product(output, state, product, rows, 0, threads);
    const int64_t values = rows * output.outputs;
    for (int64_t i = 0; i < values; i += LANES) {
      const int count = vector_at(i, values);
      store(logits + i, load(product + i, count), count);
    }
  }
}

// Decides for x [rows, size] with thresholds [rows]; returns how many rows were looked at, projected onto the whole
// vocabulary, and leave. Scratch: a row 2 * size values of T, and `outputs` more where T is not float; size + units + 2
// floats, and the shortlist's outputs.
template <class T>
Counts exit_gate(const Decisions& out, const T* x, const float* thresholds, const Gate& gate, int64_t rows, T* scratch,
                 float* wide, int threads) {
  const int64_t n = gate.weights.size, width = gate.weights.units, outputs = gate.output.outputs;
  T *state = scratch + rows * n, *product = state + rows * n;
  float *units = wide + rows * n, *probe = units + rows * width, *sure = probe + rows, *listed = sure + rows;
  const Candidates<T> candidates{state, probe, units, n, width};
  const Confirmation& confirmation = gate.confirmation;
  const float least_doubt = float(gate.least_doubt);
  exit_state(state, probe, x, gate.weights, rows, scratch, wide, threads);
  for (int64_t r = 0; r < rows; r++) out.confidence[r] = 0, out.leaves[r] = false;
  Counts counts{};
  counts.looked = keep(out.looked, nullptr, rows, candidates, [&](int64_t k, int64_t row) {
    // 0 times an infinite threshold is NaN, and a row with it never passes
    return 1.0f / (1.0f + std::exp(-probe[k])) >= thresholds[row] * float(gate.screen_ratio);
  });
  if (counts.looked == 0) return counts;
  const bool short_list = gate.shortlist.outputs > 0;
  const Matrix& first = short_list ? gate.shortlist : gate.output;
  float* seen = short_list ? listed : out.logits;
  project(seen, first, state, counts.looked, product, threads);
  gate_confidence(sure, seen, probe, units, gate.judge, gate.combine, counts.looked, first.outputs, least_doubt,
                  threads);
  for (int64_t k = 0; k < counts.looked; k++) out.confidence[out.looked[k]] = sure[k];
  // without a confirmation whoever the shortlist lets pass leaves
  const float ratio = confirmation.combine ? float(confirmation.list_ratio) : 1.0f;
  counts.whole = keep(out.whole, out.looked, counts.looked, candidates, [&](int64_t k, int64_t row) {
    return !short_list || sure[k] >= thresholds[row] * ratio;
  });
  if (short_list && counts.whole) project(out.logits, gate.output, state, counts.whole, product, threads);
  if (confirmation.combine && counts.whole) {
    gate_confidence(sure, out.logits, probe, units, confirmation.judge, confirmation.combine, counts.whole, outputs,
                    least_doubt, threads);
    for (int64_t k = 0; k < counts.whole; k++) out.confidence[out.whole[k]] = sure[k];
  }
  for (int64_t k = 0; k < counts.whole; k++) {
    const int64_t r = out.whole[k];
    if (!(out.confidence[r] >= thresholds[r])) continue;
    out.leaves[r] = true;
    if (counts.left != k)
      memcpy(out.logits + counts.left * outputs, out.logits + k * outputs, size_t(outputs) * sizeof(float));
    counts.left++;
  }
  return counts;
}
