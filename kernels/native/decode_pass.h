// A decode step in one call: all blocks, the exits on the way, and the model's own head.
//
// At an exit the gate is asked about tokens that may leave; those that do get the keys and values of the blocks that
// they skip, and the others go on, closed up. A token's bits are those of a call per stage.
#pragma once

#include <chrono>
#include <memory>
#include <vector>

#include "exit_gate.h"

// The structs are those of kernels/decode_pass/native.py, field by field.
struct PassExit {
  const Gate* gate;
  const float* thresholds;  // [tokens], infinity for those that do not ask
  int64_t depth;            // blocks in front of it
};

struct PassHead {
  const void* norm;  // [hidden], of an RMS norm; null: the caller has a head of its own
  Matrix output;
};

struct PassResult {  // a row for each token: those that leave at the first exit, at the second, then those that stay
  float* logits;    // [tokens, outputs]; without a head those of the tokens that stay are left as they are
  void* states;     // [tokens, hidden] at the exit, or behind the last block
  int64_t* order;   // [tokens] which token it is
  int64_t* left;    // [exits] how many left at each
  int64_t* gated;   // [exits] how many asked
  double* seconds;       // [exits] from the exit before to behind this one
  double* gate_seconds;  // [exits] of them in the gate
};

inline double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class T>
struct DecodePass {
  const BlockShape& shape;
  const BlockParts* blocks;
  const Pages* const* pages;
  int64_t count;
  const T* rotation;
  T* scratch;
  int64_t tile;
  int threads;
  T* hidden;  // [tokens, hidden] of those on their way, dense
  int64_t tokens;
  Batch batch;
  const int64_t* slots;
  std::vector<int64_t> order, own_positions, own_slots;  // what stands in `batch` and `slots` once some have left
  std::vector<int32_t> own_tables;

  int64_t width() const { return shape.hidden; }
  T* state(int64_t k) const { return hidden + k * width(); }
  size_t state_bytes() const { return size_t(width()) * sizeof(T); }

  BlockRun<T> work(const Batch& of, const int64_t* its_slots, int64_t its_tokens) const {
    return BlockRun<T>(shape, of, its_slots, rotation, its_tokens, tile, threads, scratch);
  }

  void run(int64_t from, int64_t to) const {
    const BlockRun<T> run = work(batch, slots, tokens);
    for (int64_t b = from; b < to; b++) run.run(blocks[b], pages[b], hidden);
  }

  // Writes what blocks from `depth` on make of tokens that leave, states [n, hidden]. Nothing attends here.
  void project_kv(int64_t depth, const T* states, const std::vector<int64_t>& leaving) const {
    std::vector<int64_t> positions, their_slots;
    for (int64_t k : leaving) positions.push_back(batch.positions[k]), their_slots.push_back(slots[k]);
    Batch of = batch;
    of.positions = positions.data();
    const BlockRun<T> run = work(of, their_slots.data(), int64_t(leaving.size()));
    for (int64_t b = depth; b < count; b++) run.project_kv(blocks[b], pages[b], states);
  }

  // Closes up what is on its way without the tokens that `leaves` [tokens].
  void keep_others(const std::vector<char>& leaves) {
    if (own_positions.empty()) {
      own_positions.assign(batch.positions, batch.positions + tokens);
      own_slots.assign(slots, slots + tokens);
      own_tables.assign(batch.page_tables, batch.page_tables + tokens * batch.table_width);
    }
    int64_t kept = 0;
    for (int64_t k = 0; k < tokens; k++) {
      if (leaves[size_t(k)]) continue;
      if (kept != k) {
        memcpy(state(kept), state(k), state_bytes());
        order[size_t(kept)] = order[size_t(k)];
        own_positions[size_t(kept)] = own_positions[size_t(k)];
        own_slots[size_t(kept)] = own_slots[size_t(k)];
        memcpy(&own_tables[size_t(kept * batch.table_width)], &own_tables[size_t(k * batch.table_width)],
               size_t(batch.table_width) * sizeof(int32_t));
      }
      kept++;
    }
    tokens = batch.rows = kept;
    batch.positions = own_positions.data();
    batch.page_tables = own_tables.data();
    slots = own_slots.data();
  }

  // Asks an exit; those that leave are the rows of `out` from `done` on. Returns how many they are.
  int64_t leave(int64_t e, const PassExit& exit, int64_t done, const PassResult& out) {
    std::vector<int64_t> asking;
    std::vector<float> thresholds;
    for (int64_t k = 0; k < tokens; k++) {
      const float threshold = exit.thresholds[order[size_t(k)]];
      if (threshold < INFINITY) asking.push_back(k), thresholds.push_back(threshold);
    }
    const int64_t rows = out.gated[e] = int64_t(asking.size());
    if (rows == 0) return 0;
    const Gate& gate = *exit.gate;
    const int64_t outputs = gate.output.outputs, listed = gate.shortlist.outputs;
    const int64_t product = std::is_same<T, float>::value ? 0 : outputs > listed ? outputs : listed;
    std::unique_ptr<T[]> gathered(new T[size_t(rows * (3 * width() + product))]);
    std::unique_ptr<float[]> wide(new float[size_t(rows * (width() + gate.weights.units + 2 + listed))]);
    std::unique_ptr<bool[]> decided(new bool[size_t(rows)]);
    std::vector<float> confidence(static_cast<size_t>(rows));
    std::vector<int64_t> looked(static_cast<size_t>(rows)), whole(static_cast<size_t>(rows));
    for (int64_t i = 0; i < rows; i++) memcpy(&gathered[size_t(i * width())], state(asking[size_t(i)]), state_bytes());
    const Decisions decisions{confidence.data(), decided.get(), looked.data(), whole.data(),
                              out.logits + done * outputs};
    const double began = seconds_now();
    const Counts counts = exit_gate(decisions, gathered.get(), thresholds.data(), gate, rows,
                                    gathered.get() + rows * width(), wide.get(), threads);
    out.gate_seconds[e] = seconds_now() - began;
    if (counts.left == 0) return 0;
    std::vector<char> leaves(static_cast<size_t>(tokens));
    std::vector<int64_t> leaving;
    T* states = (T*)out.states + done * width();
    for (int64_t i = 0; i < rows; i++) {
      if (!decided[size_t(i)]) continue;
      const int64_t k = asking[size_t(i)], place = int64_t(leaving.size());
      memcpy(states + place * width(), state(k), state_bytes());
      out.order[done + place] = order[size_t(k)];
      leaving.push_back(k);
      leaves[size_t(k)] = 1;
    }
    project_kv(exit.depth, states, leaving);
    keep_others(leaves);
    return counts.left;
  }

  // What stays: its states behind the last block, and its logits where the head is given.
  void finish(int64_t done, const PassHead& head, const PassResult& out) const {
    memcpy((T*)out.states + done * width(), hidden, size_t(tokens) * state_bytes());
    for (int64_t k = 0; k < tokens; k++) out.order[done + k] = order[size_t(k)];
    if (head.norm == nullptr || tokens == 0) return;
    const int64_t outputs = head.output.outputs;
    const int64_t product = std::is_same<T, float>::value ? 0 : outputs;
    std::unique_ptr<T[]> normed(new T[size_t(tokens * (width() + product))]);
    rms_norm(normed.get(), hidden, (const T*)head.norm, tokens, width(), width(), float(shape.eps));
    project(out.logits + done * outputs, head.output, normed.get(), tokens, normed.get() + tokens * width(), threads);
  }

  void pass(const PassExit* exits, int64_t exit_count, const PassHead& head, const PassResult& out) {
    for (int64_t k = 0; k < tokens; k++) order.push_back(k);
    int64_t done = 0, from = 0;
    for (int64_t e = 0; e < exit_count && tokens > 0; e++) {
      const double began = seconds_now();
      run(from, exits[e].depth);
      from = exits[e].depth;
      done += out.left[e] = leave(e, exits[e], done, out);
      out.seconds[e] = seconds_now() - began;
    }
    if (tokens > 0) run(from, count);
    finish(done, head, out);
  }
};
