// Rows that threads take through several operations by themselves: blocks over a few tokens of a small model, a gate.
//
// Threads that share every product wait for each other behind each, and a small model's products of a few rows are over
// in less time than that takes. A row's bits do not depend on its company, so they do not depend on this. Each thread
// reads all weights: where these come from memory and not from the caches, sharing products reads them once. No row may
// read a page that another writes in the same pass.
#pragma once

#include "blocks.h"
#include "exit_gate.h"

constexpr int64_t SHARED_GATE = 1 << 19;  // multiplications of a gate's first look from which threads may share its rows
constexpr int64_t CACHED_PART_BYTES = 4 << 20;  // weights of a block, or a gate, that stay in the caches

struct RowPart {
  int64_t row, token, tokens;  // its first row and token; how many tokens
};

template <class T>
int64_t weight_bytes(const Matrix& m) {
  if (m.group_size == 0) return m.inputs * m.outputs * int64_t(sizeof(T));
  const Groups groups{m.inputs, m.group_size, (m.inputs + m.group_size - 1) / m.group_size};
  return (m.outputs + LANES - 1) / LANES * groups.panel_bytes();
}

// Whether so many tokens are too few for threads to share a product with this matrix.
inline bool too_short_to_share(const Matrix& m, int64_t tokens) {
  return tokens * m.inputs * m.outputs < (m.group_size ? SHARED_WORK : SHARED_PRODUCTS);
}

// What a row's tokens take in a run of blocks: so many multiplications by weights each, and those of attention, as if
// without a window.
struct RowCosts {
  const Batch& batch;
  int64_t by_weights, by_key;

  int64_t of(int64_t row) const {
    int64_t cost = 0;
    for (int64_t t = batch.query_starts[row]; t < batch.query_starts[row + 1]; t++)
      cost += by_weights + by_key * (batch.positions[t] + 1);
    return cost;
  }
};

struct RowCut {
  std::vector<RowPart> parts;
  int64_t longest;  // what the dearest of them costs
};

// Cuts a batch between rows into at most `most` parts of about equal cost, `total` together.
inline RowCut cut_rows(const RowCosts& costs, int64_t total, int64_t most) {
  RowCut cut{{}, 0};
  int64_t before = 0, part = 0;
  for (int64_t row = 0; row < costs.batch.rows; row++) {
    const int64_t cost = costs.of(row), begun = int64_t(cut.parts.size()), first = costs.batch.query_starts[row];
    // a part is full once it reaches its share; the row that crosses the border goes where most of it lies
    if (begun == 0 || (begun < most && (2 * before + cost) * most >= 2 * total * begun))
      cut.parts.push_back({row, first, 0}), part = 0;
    cut.parts.back().tokens += costs.batch.query_starts[row + 1] - first;
    before += cost, part += cost;
    cut.longest = part > cut.longest ? part : cut.longest;
  }
  return cut;
}

// The parts that a pass of these blocks is cut into; one where threads had better share its products.
template <class T>
std::vector<RowPart> row_parts(const BlockRun<T>& whole, const BlockParts* blocks, int64_t count) {
  const int64_t tokens = whole.tokens, threads = whole.threads;
  const std::vector<RowPart> one{{0, 0, tokens}};
  if (threads < 2 || whole.batch.rows < 2 || tokens > whole.tile) return one;
  bool all_short = true;
  RowCosts costs{whole.batch, 0, 0};
  for (const BlockParts* block = blocks; block < blocks + count; block++) {
    int64_t bytes = 0;
    for (const Matrix* m : {&block->qkv, &block->out, &block->up, &block->down}) {
      bytes += weight_bytes<T>(*m), costs.by_weights += m->inputs * m->outputs;
      all_short = all_short && too_short_to_share(*m, tokens);
    }
    if (bytes > CACHED_PART_BYTES) return one;
    if (!block->is_linear_map) costs.by_key += 2 * whole.queries();
  }
  if (tokens * costs.by_weights < whole.shape.own_rows_work) return one;
  int64_t total = 0;
  for (int64_t row = 0; row < whole.batch.rows; row++) total += costs.of(row);
  RowCut cut = cut_rows(costs, total, threads);
  const int64_t busy = int64_t(cut.parts.size());
  // where no product is long enough to share, any cut gains whose dearest part is at most two thirds; elsewhere threads
  // would have shared: only one that busies all of them, at most a third above an even share
  const bool gains = all_short ? 3 * cut.longest <= 2 * total : busy == threads && 3 * cut.longest * busy <= 4 * total;
  return busy > 1 && gains ? cut.parts : one;
}

// Replaces `hidden` [tokens, hidden] by the state behind `count` blocks.
template <class T>
void run_blocks(const BlockRun<T>& whole, const BlockParts* blocks, const Pages* const* pages, int64_t count,
                T* hidden) {
  const std::vector<RowPart> parts = row_parts(whole, blocks, count);
  if (parts.size() < 2) {
    for (int64_t b = 0; b < count; b++) whole.run(blocks[b], pages[b], hidden);
    return;
  }
  std::vector<int32_t> starts;  // of the rows' tokens, counted from their part's first
  for (size_t p = 0; p < parts.size(); p++) {
    const int64_t end = p + 1 < parts.size() ? parts[p + 1].row : whole.batch.rows;
    for (int64_t row = parts[p].row; row <= end; row++)
      starts.push_back(int32_t(whole.batch.query_starts[row] - parts[p].token));
  }
  share(int64_t(parts.size()), whole.threads, 1, [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; p++) {
      const RowPart& part = parts[size_t(p)];
      const int64_t end = p + 1 < int64_t(parts.size()) ? parts[size_t(p + 1)].row : whole.batch.rows;
      const Batch batch{whole.batch.positions + part.token, starts.data() + part.row + p,
                        whole.batch.page_tables + part.row * whole.batch.table_width, end - part.row,
                        whole.batch.table_width, whole.batch.max_context};
      const BlockRun<T> run = whole.of(batch, part.token, part.tokens);
      for (int64_t b = 0; b < count; b++) run.run(blocks[b], pages[b], hidden + part.token * whole.shape.hidden);
    }
  });
}

// `exit_gate`, whose rows the threads share where its weights are few.
template <class T>
Counts shared_exit_gate(const Decisions& out, const T* x, const float* thresholds, const Gate& gate, int64_t rows,
                        T* scratch, float* wide, int threads) {
  const ExitWeights& weights = gate.weights;
  const int64_t n = weights.size, outputs = gate.output.outputs, listed = gate.shortlist.outputs;
  const int64_t most = rows < threads ? rows : threads;
  const int64_t first_look = rows * n * (n + weights.units + (listed ? listed : outputs));
  if (most < 2 || first_look < SHARED_GATE || weight_bytes<T>(gate.output) > CACHED_PART_BYTES)
    return exit_gate(out, x, thresholds, gate, rows, scratch, wide, threads);
  const int64_t product = std::is_same<T, float>::value ? 0 : outputs > listed ? outputs : listed;
  std::vector<Counts> found(static_cast<size_t>(most));
  const auto first_of = [&](int64_t part) { return part * rows / most; };
  share(most, threads, 1, [&](int64_t from, int64_t to) {
    for (int64_t part = from; part < to; part++) {
      const int64_t first = first_of(part), count = first_of(part + 1) - first;
      const Decisions its{out.confidence + first, out.leaves + first, out.looked + first, out.whole + first,
                          out.logits + first * outputs};
      found[size_t(part)] = exit_gate(its, x + first * n, thresholds + first, gate, count,
                                      scratch + first * (2 * n + product),
                                      wide + first * (n + weights.units + 2 + listed), 1);
    }
  });
  Counts all{};
  for (int64_t part = 0; part < most; part++) {  // closes up what each part has found; the first lies right
    const int64_t first = first_of(part);
    const Counts& its = found[size_t(part)];
    for (int64_t k = 0; k < its.looked; k++) out.looked[all.looked++] = first + out.looked[first + k];
    for (int64_t k = 0; k < its.whole; k++) out.whole[all.whole++] = first + out.whole[first + k];
    if (part) memmove(out.logits + all.left * outputs, out.logits + first * outputs,
                      size_t(its.left * outputs) * sizeof(float));
    all.left += its.left;
  }
  return all;
}
