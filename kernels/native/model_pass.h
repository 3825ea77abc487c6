// A pass through a whole model in one call: all blocks, the exits on the way, and the model's own head.
//
// Tokens come in at the front, or behind an exit where they waited. At an exit the gate is asked about tokens that may
// leave; what becomes of those that do is said by their row (`AtExit`), and the others go on, closed up. A token's bits
// are those of a call per stage.
#pragma once

#include <chrono>
#include <memory>
#include <new>
#include <vector>

#include "draw.h"
#include "row_parts.h"

enum AtExit : int64_t {  // what a row does when a token of it leaves; its logits are the exit's in any case
  LEAVES,                // that token is gone for good: it gets the keys and values of the blocks that it skips
  WAITS,                 // all of the row's tokens that are on their way stop there
  STAYS                  // all of them go on to the end
};

// The structs are those of kernels/model_pass/native.py and batch.py, field by field.
struct PassExit {
  const Gate* gate;
  int64_t depth;  // blocks in front of it
};

struct PassHead {
  const void* norm;  // [hidden], of an RMS norm; null: the caller has a head of its own
  Matrix output;
};

struct PassEmbedding {
  const void* tokens;     // [ids, hidden]
  const void* positions;  // [most, hidden] or null
  int64_t ids, most;
};

struct PassModel {
  PassEmbedding embedding;
  const BlockShape* shape;
  const BlockParts* blocks;
  int64_t count;
  const PassExit* exits;  // ascending
  int64_t exit_count;
  PassHead head;
};

// Numbers lie one behind the other, as kernels/model_pass/batch.py puts them.
struct PassBatch {
  int64_t tokens, rows, table_width, max_context;
  const int64_t* numbers;    // of each token the six and of each row the two that follow
  const int32_t* row_parts;  // starts [rows + 1] of the rows' tokens, page tables [rows, table_width], then of each
                             // token the two keys of the noise that its successor is drawn with
  const float* reals;        // [2, tokens] the confidence at which it leaves, and the temperature of that draw
  const int32_t* token_keys; // [outputs] those of the vocabulary; null: nothing is drawn

  const int64_t* positions() const { return numbers; }
  const int64_t* slots() const { return numbers + tokens; }
  const int64_t* entry() const { return numbers + 2 * tokens; }   // 0: at the first block, e + 1: behind exit e
  const int64_t* asks() const { return numbers + 3 * tokens; }    // bit e: it may leave at exit e
  const int64_t* wants_logits() const { return numbers + 4 * tokens; }  // of the head, unless an exit has given them
  const int64_t* ids() const { return numbers + 5 * tokens; }     // of those that come in at the front
  const int64_t* row_entry() const { return numbers + 6 * tokens; }  // its other tokens join it while it is on its way
  const int64_t* at_exit() const { return row_entry() + rows; }      // AtExit
  const int32_t* table(int64_t row) const { return row_parts + rows + 1 + row * table_width; }

  const int32_t* keys(int64_t token) const { return table(rows) + 2 * token; }

  // What of it names something that there is not, 0 where all is well; kernels/model_pass/native.py says it in words.
  int fault(const PassModel& model) const {
    const int64_t count = model.exit_count;
    const PassEmbedding& embedding = model.embedding;
    for (int64_t r = 0; r < rows; r++)
      if (row_parts[r] >= row_parts[r + 1]) return 1;
    if (row_parts[0] != 0 || row_parts[rows] != tokens) return 1;
    for (int64_t k = 0; k < tokens; k++) {
      if (entry()[k] < 0 || entry()[k] > count) return 2;
      if (asks()[k] < 0 || asks()[k] >> count) return 3;
      if (ids()[k] < 0 || ids()[k] >= embedding.ids) return 4;
      if (embedding.positions && (positions()[k] < 0 || positions()[k] >= embedding.most)) return 5;
    }
    for (int64_t r = 0; r < rows; r++) {
      if (row_entry()[r] < 0 || row_entry()[r] > count) return 6;
      if (at_exit()[r] < LEAVES || at_exit()[r] > STAYS) return 7;
    }
    return 0;
  }
};

struct PassResult {
  void* states;   // [tokens, hidden] where those come in that wait; then where each stopped
  float* logits;  // [rows, outputs] of tokens that leave at the first exit, at the second, then of those the head is
                  // asked about, which is left to the caller where there is no head
  int64_t* counts;
  float* logprobs;  // [rows of logits] of the ids that were drawn; NaN where logits are not usable
  double* seconds;  // [exits + 1] of each stage, its gate, or the head and all draws, included; then [exits] in the gate
  int64_t all_tokens, exits;

  int64_t* with_logits() const { return counts; }  // [tokens] which token each row of logits is of
  // [tokens] behind which exit it stopped; behind the last block: how many exits there are; -1: it never came in
  int64_t* stopped() const { return counts + all_tokens; }
  int64_t* tokens() const { return stopped() + all_tokens; }  // [exits + 1] on their way in each stage
  int64_t* rows() const { return tokens() + exits + 1; }
  int64_t* logits_of() const { return rows() + exits + 1; }    // [exits + 1] its rows of logits; the last: the head's
  int64_t* gated() const { return logits_of() + exits + 1; }   // [exits] tokens that its gate was asked about
  int64_t* ends_piece() const { return gated() + exits; }      // [exits] whether anything could happen there
  int64_t* drawn() const { return ends_piece() + exits; }      // [tokens] ids, behind each token with logits
  int64_t numbers() const { return 3 * all_tokens + 5 * exits + 3; }
};

struct FreesAligned {
  void operator()(void* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};

// Room for so many values, which are not set, from a cache line's start on.
template <class T>
std::unique_ptr<T[], FreesAligned> room_for(int64_t values) {
  return std::unique_ptr<T[], FreesAligned>((T*)::operator new[](size_t(values) * sizeof(T), std::align_val_t{64}));
}

inline double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class T>
struct ModelPass {
  const PassModel& model;
  const Pages* const* pages;
  const T* rotation;
  const PassBatch& all;
  const PassResult& out;
  const int64_t tile;
  const int threads;
  std::unique_ptr<T[], FreesAligned> hidden, scratch;  // states of the tokens on their way, dense; blocks' scratch
  std::vector<int64_t> row_of;            // of all tokens
  std::vector<char> left;                 // of all tokens, whether an exit has spoken
  std::vector<int64_t> order;             // the tokens on their way, ascending
  std::vector<int64_t> positions, slots;  // theirs
  std::vector<int32_t> starts, tables;
  Batch batch{};
  int64_t logit_rows = 0;

  ModelPass(const PassModel& model_, const Pages* const* pages_, const void* rotation_, const PassBatch& all_,
             const PassResult& out_, int64_t tile_, int threads_)
      : model(model_), pages(pages_), rotation((const T*)rotation_), all(all_), out(out_), tile(tile_),
        threads(threads_), left(size_t(all_.tokens)) {
    const BlockShape& shape = *model.shape;
    hidden = room_for<T>(all.tokens * shape.hidden);
    scratch = room_for<T>(all.tokens * shape.projected() + (all.tokens < tile ? all.tokens : tile) * shape.between());
    memset(out.counts, 0, size_t(out.numbers()) * sizeof(int64_t));
    memset(out.seconds, 0, size_t(2 * out.exits + 1) * sizeof(double));
    for (int64_t r = 0; r < all.rows; r++)
      row_of.insert(row_of.end(), size_t(all.row_parts[r + 1] - all.row_parts[r]), r);
    for (int64_t k = 0; k < all.tokens; k++) out.stopped()[k] = -1;
  }

  int64_t width() const { return model.shape->hidden; }
  size_t state_bytes() const { return size_t(width()) * sizeof(T); }
  T* state(int64_t k) { return hidden.get() + k * width(); }
  T* kept(int64_t token) const { return (T*)out.states + token * width(); }
  int64_t on_way() const { return int64_t(order.size()); }
  int64_t row(int64_t k) const { return row_of[size_t(order[size_t(k)])]; }

  // Describes what is on its way.
  void describe() {
    positions.clear(), slots.clear(), starts.clear(), tables.clear();
    int64_t last = -1;
    for (int64_t token : order) {
      const int64_t its_row = row_of[size_t(token)];
      if (its_row != last) {
        starts.push_back(int32_t(positions.size()));
        tables.insert(tables.end(), all.table(its_row), all.table(its_row) + all.table_width);
        last = its_row;
      }
      positions.push_back(all.positions()[token]), slots.push_back(all.slots()[token]);
    }
    const int64_t rows = int64_t(starts.size());
    starts.push_back(int32_t(positions.size()));
    batch = {positions.data(), starts.data(), tables.data(), rows, all.table_width, all.max_context};
  }

  BlockRun<T> work(const Batch& of, const std::vector<int64_t>& its_slots) {
    return BlockRun<T>(*model.shape, of, its_slots.data(), rotation, int64_t(its_slots.size()), tile, threads,
                       scratch.get());
  }

  void run(int64_t from, int64_t to) {
    if (order.empty()) return;
    run_blocks(work(batch, slots), model.blocks + from, pages + from, to - from, hidden.get());
  }

  // Writes what blocks from `depth` on make of the tokens at places `leaving`. Nothing attends here.
  void project_kv(int64_t depth, const std::vector<int64_t>& leaving) {
    std::vector<int64_t> their_positions, their_slots;
    const auto states = room_for<T>(int64_t(leaving.size()) * width());
    for (int64_t k : leaving) {
      memcpy(&states[their_slots.size() * size_t(width())], state(k), state_bytes());
      their_positions.push_back(positions[size_t(k)]), their_slots.push_back(slots[size_t(k)]);
    }
    Batch of = batch;
    of.positions = their_positions.data();
    const BlockRun<T> run = work(of, their_slots);
    for (int64_t b = depth; b < model.count; b++) run.project_kv(model.blocks[b], pages[b], states.get());
  }

  // Has the tokens at the places that `stops` [on their way] stop behind exit `e`, and closes up the others.
  void stop(int64_t e, const std::vector<char>& stops) {
    size_t going = 0;
    for (size_t k = 0; k < order.size(); k++) {
      if (stops[k]) {
        memcpy(kept(order[k]), state(int64_t(k)), state_bytes());
        out.stopped()[order[k]] = e;
        continue;
      }
      if (going != k) memcpy(state(int64_t(going)), state(int64_t(k)), state_bytes());
      order[going++] = order[k];
    }
    order.resize(going);
  }

  // Where a token comes in: embedded, or as it waited.
  void begin(int64_t token, T* state) const {
    const PassEmbedding& embedding = model.embedding;
    if (all.entry()[token]) {
      memcpy(state, kept(token), state_bytes());
      return;
    }
    memcpy(state, (const T*)embedding.tokens + all.ids()[token] * width(), state_bytes());
    if (!embedding.positions) return;
    const T* place = (const T*)embedding.positions + all.positions()[token] * width();
    for (int64_t i = 0; i < width(); i += LANES) {
      const int count = vector_at(i, width());
      store(state + i, load(state + i, count) + load(place + i, count), count);
    }
  }

  // Has tokens come in at `entry`, those whose row is on its way or comes in there too; returns whether any did.
  bool join(int64_t entry) {
    std::vector<char> present(static_cast<size_t>(all.rows));
    for (int64_t r = 0; r < all.rows; r++) present[size_t(r)] = all.row_entry()[r] == entry;
    for (int64_t token : order) present[size_t(row_of[size_t(token)])] = 1;
    std::vector<int64_t> coming;
    for (int64_t k = 0; k < all.tokens; k++)
      if (all.entry()[k] == entry && present[size_t(row_of[size_t(k)])]) coming.push_back(k);
    if (coming.empty()) return false;
    // both lists ascend: merged from behind, no state is overwritten before it has moved
    int64_t going = on_way() - 1, next = int64_t(coming.size()) - 1;
    order.resize(order.size() + coming.size());
    for (int64_t to = on_way() - 1; next >= 0; to--) {
      if (going >= 0 && order[size_t(going)] > coming[size_t(next)]) {
        memcpy(state(to), state(going), state_bytes());
        order[size_t(to)] = order[size_t(going--)];
      } else {
        begin(coming[size_t(next)], state(to));
        order[size_t(to)] = coming[size_t(next--)];
      }
    }
    return true;
  }

  // The places of tokens that the gate of exit `e` is asked about; says in `ends_piece` whether any could have asked.
  std::vector<int64_t> asking(int64_t e) const {
    std::vector<int64_t> found;
    for (int64_t k = 0; k < on_way(); k++) {
      const size_t token = size_t(order[size_t(k)]);
      if (!(all.asks()[token] >> e & 1)) continue;
      out.ends_piece()[e] = 1;
      if (!left[token]) found.push_back(k);
    }
    return found;
  }

  // Asks the gate of exit `e` about tokens at places `asked`; returns the places of those that leave.
  std::vector<int64_t> leaving(int64_t e, const Gate& gate, const std::vector<int64_t>& asked) {
    const int64_t rows = int64_t(asked.size()), outputs = gate.output.outputs, listed = gate.shortlist.outputs;
    const int64_t product = std::is_same<T, float>::value ? 0 : outputs > listed ? outputs : listed;
    const auto gathered = room_for<T>(rows * (3 * width() + product));
    const auto wide = room_for<float>(rows * (width() + gate.weights.units + 2 + listed));
    std::unique_ptr<bool[]> decided(new bool[size_t(rows)]);
    std::vector<float> confidence(static_cast<size_t>(rows)), thresholds;
    std::vector<int64_t> looked(static_cast<size_t>(rows)), projected(static_cast<size_t>(rows)), found;
    for (int64_t i = 0; i < rows; i++) {
      const int64_t k = asked[size_t(i)];
      memcpy(&gathered[size_t(i * width())], state(k), state_bytes());
      thresholds.push_back(all.reals[order[size_t(k)]]);
    }
    const Decisions decisions{confidence.data(), decided.get(), looked.data(), projected.data(),
                              out.logits + logit_rows * outputs};
    const double began = seconds_now();
    shared_exit_gate(decisions, gathered.get(), thresholds.data(), gate, rows, gathered.get() + rows * width(),
                     wide.get(), threads);
    out.seconds[out.exits + 1 + e] = seconds_now() - began;
    for (int64_t i = 0; i < rows; i++)
      if (decided[size_t(i)]) found.push_back(asked[size_t(i)]);
    return found;
  }

  // Behind exit `e`: who leaves, and what that means for their rows. Returns whether anybody has stopped.
  bool leave(int64_t e, const PassExit& exit) {
    const std::vector<int64_t> asked = asking(e);
    out.gated()[e] = int64_t(asked.size());
    if (asked.empty()) return false;
    const std::vector<int64_t> found = leaving(e, *exit.gate, asked);
    out.logits_of()[e] = int64_t(found.size());
    std::vector<char> stops(order.size()), waits(static_cast<size_t>(all.rows));
    std::vector<int64_t> gone;
    bool any = false;
    for (int64_t k : found) {
      const int64_t token = order[size_t(k)], what = all.at_exit()[row(k)];
      out.with_logits()[logit_rows++] = token;
      left[size_t(token)] = 1;
      any = any || what != STAYS;
      if (what == LEAVES) stops[size_t(k)] = 1, gone.push_back(k);
      if (what == WAITS) waits[size_t(row(k))] = 1;
    }
    if (!any) return false;
    for (int64_t k = 0; k < on_way(); k++)
      if (waits[size_t(row(k))]) stops[size_t(k)] = 1;
    if (!gone.empty()) project_kv(exit.depth, gone);
    stop(e, stops);
    return true;
  }

  // What is left behind the last block: its states, and the logits that are wanted where the head is given.
  void finish() {
    const PassHead& head = model.head;
    std::vector<int64_t> asked;
    for (int64_t k = 0; k < on_way(); k++) {
      const int64_t token = order[size_t(k)];
      if (!all.wants_logits()[token] || left[size_t(token)]) continue;
      out.with_logits()[logit_rows + int64_t(asked.size())] = token;
      asked.push_back(k);
    }
    stop(out.exits, std::vector<char>(order.size(), 1));  // the dense states stay where they are
    const int64_t rows = out.logits_of()[out.exits] = int64_t(asked.size());
    if (head.norm == nullptr) return;  // the caller's
    const int64_t outputs = head.output.outputs, product = std::is_same<T, float>::value ? 0 : outputs;
    const auto normed = room_for<T>(rows * (width() + product));
    for (int64_t i = 0; i < rows; i++)
      rms_norm(&normed[size_t(i * width())], state(asked[size_t(i)]), (const T*)head.norm, 1, width(), width(),
               float(model.shape->eps));
    if (rows > 0)
      project(out.logits + logit_rows * outputs, head.output, normed.get(), rows, normed.get() + rows * width(),
              threads);
    logit_rows += rows;
    if (all.token_keys) draw(outputs);
  }

  // The successors of all tokens with logits [logit_rows, outputs].
  void draw(int64_t outputs) const {
    std::vector<float> temperatures;
    std::vector<int32_t> keys;
    for (int64_t i = 0; i < logit_rows; i++) {
      const int64_t token = out.with_logits()[i];
      temperatures.push_back(all.reals[all.tokens + token]);
      keys.insert(keys.end(), all.keys(token), all.keys(token) + 2);
    }
    draw_rows(out.drawn(), out.logprobs, out.logits, out.logits, logit_rows, outputs, temperatures.data(), keys.data(),
              all.token_keys, threads);
  }

  void pass() {
    const PassExit* exits = model.exits;
    join(0);
    describe();
    int64_t from = 0;
    for (int64_t e = 0; e < out.exits; e++) {
      const double began = seconds_now();
      out.tokens()[e] = on_way(), out.rows()[e] = batch.rows;
      run(from, exits[e].depth);
      from = exits[e].depth;
      const bool stopped = leave(e, exits[e]), joined = join(e + 1);
      out.ends_piece()[e] |= joined;
      if (stopped || joined) describe();
      out.seconds[e] = seconds_now() - began;
    }
    const double began = seconds_now();
    out.tokens()[out.exits] = on_way(), out.rows()[out.exits] = batch.rows;
    run(from, model.count);
    finish();
    out.seconds[out.exits] = seconds_now() - began;
  }
};
