// Softmax attention over pages in one pass: blocks of LANES keys at absolute positions 0, LANES, 2 LANES, …
//
// One task is one KV head and up to four query tokens of a row that stand close together: all their heads read a
// block of keys and values in turn, four heads at a time. A block's scores lie in the lanes of one vector. What is
// computed for a token depends on its position, its keys and values, and the model's shape alone: keys that only its
// neighbours see have weight 0 for it and change nothing.
//
// Full pages are read in their dtype. INT4 pages are unpacked in registers: with k = c s + m,  q·k = s Σ q c + m Σ q
// and  Σ p v = Σ (p s) c + Σ p m.  Codes of even elements are in low nibbles, of odd ones in high nibbles, so queries
// are laid out as [even LANES, odd LANES, even LANES, …] and the result is put back in order at the end.
#pragma once

#include <vector>

#include "pages.h"
#include "threads.h"

constexpr int64_t TOKEN_TILE = 4;           // query tokens that may share a task
constexpr int64_t SHARED_SCORES = 1 << 17;  // keys × head_dim × heads from which threads pay

template <class T>
struct FullPages {
  static constexpr int UNIT = 1;  // vectors that one load yields
  static constexpr bool INT4 = false;
  static inline __attribute__((always_inline)) void read(const char* p, int64_t chunk, int n, vf (&out)[UNIT]) {
    out[0] = load((const T*)p + chunk * LANES, n);
  }
};

struct Int4Pages {
  static constexpr int UNIT = 2;
  static constexpr bool INT4 = true;
  static inline __attribute__((always_inline)) void read(const char* p, int64_t chunk, int n, vf (&out)[UNIT]) {
    vi bytes = widened(load_u8(p + chunk * LANES, n));
    out[0] = __builtin_convertvector(bytes & 15, vf);
    out[1] = __builtin_convertvector(bytes >> 4, vf);
  }
};

struct KeyBlock {  // LANES keys; those outside first .. last - 1 stand for one inside and count for nothing
  const char* keys[LANES];
  const char* values[LANES];
  vf key_scale, key_minimum, value_scale, value_minimum;
  int64_t start;  // position of lane 0
  int first, last;
};

struct Shape {            // of one key: elements (full) or bytes (INT4), LANES to a load
  int64_t chunks, whole;  // loads, and those of them that are full
  int rest;               // values of the last one, where it is not
};

struct Head {  // the state of one query head
  const vf* query;
  vf* mixed;  // Σ p v so far
  vf total, minimum;  // Σ p and Σ p m by lane
  float top, query_sum;
  int64_t first, last;  // it sees keys first .. last - 1
};

inline int within_block(int64_t key, int64_t start) {
  return int(key <= start ? 0 : key - start < LANES ? key - start : LANES);
}

// The products of four keys with GT heads, from `chunk` on in every key; WHOLE: all its LANES values are there.
template <class KV, int GT, bool WHOLE>
inline __attribute__((always_inline)) void add_products(vf (&part)[GT][4], const char* const* keys, const Head* heads,
                                                        int64_t chunk, int count) {
  constexpr int UNIT = KV::UNIT;
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    vf key[UNIT];
    KV::read(keys[j], chunk, WHOLE ? LANES : count, key);
#pragma GCC unroll 4
    for (int g = 0; g < GT; g++)
#pragma GCC unroll 2
      for (int u = 0; u < UNIT; u++) part[g][j] = fused(heads[g].query[chunk * UNIT + u], key[u], part[g][j]);
  }
}

// scores[g] of GT heads against the block's keys, by lane.
template <class KV, int GT>
inline __attribute__((always_inline)) void score(const KeyBlock& block, const Shape& shape, const Head* heads,
                                                 vf (&scores)[GT]) {
  vf fours[GT][LANES / 4];
#pragma GCC unroll 4
  for (int k = 0; k < LANES; k += 4) {
    vf part[GT][4];
#pragma GCC unroll 4
    for (int g = 0; g < GT; g++)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) part[g][j] = vf{};
    int64_t c = 0;
    for (; c < shape.whole; c++) add_products<KV, GT, true>(part, block.keys + k, heads, c, LANES);
    if (c < shape.chunks) add_products<KV, GT, false>(part, block.keys + k, heads, c, shape.rest);
#pragma GCC unroll 4
    for (int g = 0; g < GT; g++)
      fours[g][k / 4] = pair_sums(pair_sums(part[g][0], part[g][1]), pair_sums(part[g][2], part[g][3]));
  }
#pragma GCC unroll 4
  for (int g = 0; g < GT; g++) {
#if defined(EXEUNT_AVX512)
    scores[g] = pair_sums(pair_sums(fours[g][0], fours[g][1]), pair_sums(fours[g][2], fours[g][3]));
#else
    scores[g] = pair_sums(fours[g][0], fours[g][1]);
#endif
    if (KV::INT4) scores[g] = fused(scores[g], block.key_scale, block.key_minimum * heads[g].query_sum);
  }
}

// Adds one chunk of the block's values to GT heads with their weights by key.
template <class KV, int GT, bool WHOLE>
inline __attribute__((always_inline)) void mix_chunk(const KeyBlock& block, Head* heads, const float (*weight)[LANES],
                                                     int64_t c, int count) {
  constexpr int UNIT = KV::UNIT;
  vf mixed[GT][UNIT];
#pragma GCC unroll 4
  for (int g = 0; g < GT; g++)
#pragma GCC unroll 2
    for (int u = 0; u < UNIT; u++) mixed[g][u] = heads[g].mixed[c * UNIT + u];
#pragma GCC unroll 2
  for (int k = 0; k < LANES; k++) {
    vf value[UNIT];
    KV::read(block.values[k], c, WHOLE ? LANES : count, value);
#pragma GCC unroll 4
    for (int g = 0; g < GT; g++)
#pragma GCC unroll 2
      for (int u = 0; u < UNIT; u++) mixed[g][u] = fused(splat(weight[g][k]), value[u], mixed[g][u]);
  }
#pragma GCC unroll 4
  for (int g = 0; g < GT; g++)
#pragma GCC unroll 2
    for (int u = 0; u < UNIT; u++) heads[g].mixed[c * UNIT + u] = mixed[g][u];
}

// Adds the block's values to GT heads with weights p[g] by lane.
template <class KV, int GT>
inline __attribute__((always_inline)) void mix(const KeyBlock& block, const Shape& shape, Head* heads,
                                               const vf (&p)[GT]) {
  float weight[GT][LANES];
  memcpy(weight, p, sizeof weight);
  int64_t c = 0;
  for (; c < shape.whole; c++) mix_chunk<KV, GT, true>(block, heads, weight, c, LANES);
  if (c < shape.chunks) mix_chunk<KV, GT, false>(block, heads, weight, c, shape.rest);
}

template <class KV, int GT>
void attend(const KeyBlock& block, const Shape& shape, Head* heads) {
  vf scores[GT], p[GT];
  score<KV, GT>(block, shape, heads, scores);
  vi lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  for (int g = 0; g < GT; g++) {
    Head& head = heads[g];
    const vi seen = (lane >= within_block(head.first, block.start)) & (lane < within_block(head.last, block.start));
    vf valid = seen ? scores[g] : splat(-INFINITY);
    const float top = largest(valid);
    if (top > head.top) {  // never for equal tops, where the factor would be 1
      const float fade = head.top == -INFINITY ? 0.0f : std::exp(head.top - top);
      head.total *= fade;
      head.minimum *= fade;
      for (int64_t i = 0; i < shape.chunks * KV::UNIT; i++) head.mixed[i] *= fade;
      head.top = top;
    }
    vf weight = exponential(scores[g] - head.top);
    weight = seen ? weight : vf{};
    head.total += weight;
    if (KV::INT4) head.minimum = fused(weight, block.value_minimum, head.minimum);
    p[g] = KV::INT4 ? weight * block.value_scale : weight;
  }
  mix<KV, GT>(block, shape, heads, p);
}

inline void read_params(const char* const* places, vf* scale, vf* minimum) {
  uint32_t both[LANES];
  for (int k = 0; k < LANES; k++) memcpy(both + k, places[k], 4);
  vu pairs = loaded<vu>(both);
  *scale = from_half(__builtin_convertvector(pairs & 0xffff, vu16));
  *minimum = from_half(__builtin_convertvector(pairs >> 16, vu16));
}

inline int inside(int lane, const KeyBlock& block) {  // the nearest lane whose key is there
  return lane < block.first ? block.first : lane < block.last ? lane : block.last - 1;
}

// The addresses of a block's keys, the first of which is at `place` of a page that holds them all.
inline void spread(const PagedTensor& tensor, int64_t page, int64_t head, int64_t place, const KeyBlock& block,
                   const char** places) {
  const char* first = tensor.at(page, head, place) - block.first * tensor.token;
  for (int k = 0; k < LANES; k++) places[k] = first + inside(k, block) * tensor.token;
}

template <class KV>
void find_block(const Pages& pages, const int32_t* table, int64_t head, int64_t start, int64_t first,
                int64_t last, KeyBlock* block) {
  const char *key_params[LANES], *value_params[LANES];
  block->start = start;
  block->first = within_block(first, start);
  block->last = within_block(last, start);
  const int64_t place = (start + block->first) % pages.page_tokens;
  const int32_t* entry = table + (start + block->first) / pages.page_tokens;
  const int count = block->last - block->first;
  if (place + count <= pages.page_tokens) {  // all on one page
    spread(pages.keys, *entry, head, place, *block, block->keys);
    spread(pages.values, *entry, head, place, *block, block->values);
    if (KV::INT4) {
      spread(pages.key_params, *entry, head, place, *block, key_params);
      spread(pages.value_params, *entry, head, place, *block, value_params);
    }
  } else {
    for (int k = 0; k < LANES; k++) {
      const int64_t key = place + inside(k, *block) - block->first, there = key % pages.page_tokens;
      const int32_t page = entry[key / pages.page_tokens];
      block->keys[k] = pages.keys.at(page, head, there);
      block->values[k] = pages.values.at(page, head, there);
      if (KV::INT4) {
        key_params[k] = pages.key_params.at(page, head, there);
        value_params[k] = pages.value_params.at(page, head, there);
      }
    }
  }
  if (KV::INT4) {
    read_params(key_params, &block->key_scale, &block->key_minimum);
    read_params(value_params, &block->value_scale, &block->value_minimum);
  }
}

// [a0, a1, …] → evens | odds, chunk by chunk, and back.
inline void split_pairs(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i++) out[i / (2 * LANES) * (2 * LANES) + i % 2 * LANES + i / 2 % LANES] = x[i];
}
inline void join_pairs(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i++) out[i] = x[i / (2 * LANES) * (2 * LANES) + i % 2 * LANES + i / 2 % LANES];
}

struct AttentionScratch {
  std::vector<vf> queries, mixed, ordered;
  std::vector<Head> heads;
};

// The state of one head of one token before its first block.
template <class KV, class Q>
Head new_head(const Q* query, int64_t n, float scale, vf* to, vf* mixed, int64_t vectors, vf* ordered) {
  vf* x = KV::INT4 ? ordered : to;
  load_padded(x, query, n);
  if (KV::INT4) rotate(x, n);
  for (int64_t i = 0; i * LANES < n; i++) x[i] *= scale;
  if (KV::INT4) split_pairs((const float*)x, n, (float*)to);
  vf total{};
  for (int64_t i = 0; i < vectors; i++) total += to[i];
  return Head{to, mixed, vf{}, vf{}, -INFINITY, sum(total), 0, 0};
}

// Returns whether all it has written is finite.
template <class KV, class Q>
bool finish_head(const Head& head, int64_t n, int64_t vectors, vf* ordered, Q* out) {
  const float inverse = 1.0f / sum(head.total), minimum = sum(head.minimum);
  for (int64_t i = 0; i < vectors; i++)
    head.mixed[i] = (KV::INT4 ? head.mixed[i] + minimum : head.mixed[i]) * inverse;
  const vf* x = head.mixed;
  if (KV::INT4) {
    join_pairs((const float*)x, n, (float*)ordered);
    x = ordered;
  }
  vf odd{};  // NaN where a value is not finite; what pads the last vector is 0
  for (int64_t i = 0; i < n; i += LANES) {
    store(out + i, x[i / LANES], int(n - i < LANES ? n - i : LANES));
    odd += x[i / LANES] - x[i / LANES];
  }
  return sum(odd) == 0.0f;
}

template <class KV>
void attend_block(const KeyBlock& block, const Shape& shape, Head* heads, int64_t count) {
  int64_t g = 0;
  for (; g + 4 <= count; g += 4) attend<KV, 4>(block, shape, heads + g);
  if (count - g == 3) attend<KV, 3>(block, shape, heads + g);
  if (count - g == 2) attend<KV, 2>(block, shape, heads + g);
  if (count - g == 1) attend<KV, 1>(block, shape, heads + g);
}

template <class Q>
struct Queries {  // of the batch's tokens `first` to `first` + `count` - 1
  const Q* data;  // of all of the batch: [tokens, heads, head_dim] with `stride` elements between tokens
  int64_t stride, heads, first, count;
};

template <class KV, class Q>
struct Attention {
  const Pages& pages;
  const Batch& batch;
  const Queries<Q>& queries;
  Q* out;  // [count, heads, head_dim]
  float scale;
  int64_t window;

  // The query heads of `kv_head`, for tokens `token` to `token` + `count` - 1 of `row`.
  void attend_tokens(int64_t token, int64_t count, int64_t row, int64_t kv_head, AttentionScratch& scratch) const {
    const int64_t heads = queries.heads, n = pages.head_dim, group = heads / pages.kv_heads, all = count * group;
    const int64_t width = n / KV::UNIT;
    const Shape shape{(width + LANES - 1) / LANES, width / LANES, int(width % LANES)};
    const int64_t vectors = shape.chunks * KV::UNIT;
    scratch.queries.assign(size_t(all * vectors), vf{});
    scratch.mixed.assign(size_t(all * vectors), vf{});
    scratch.heads.resize(size_t(all));
    scratch.ordered.resize(size_t(vectors));
    Head* state = scratch.heads.data();
    for (int64_t i = 0; i < all; i++) {
      const int64_t t = token + i / group, h = kv_head * group + i % group, position = batch.positions[t];
      state[i] = new_head<KV>(queries.data + t * queries.stride + h * n, n, scale, scratch.queries.data() + i * vectors,
                              scratch.mixed.data() + i * vectors, vectors, scratch.ordered.data());
      state[i].first = position - window + 1 > 0 ? position - window + 1 : 0;
      state[i].last = position + 1;
    }
    const int32_t* table = batch.page_tables + row * batch.table_width;
    const int64_t first = state[0].first, last = state[all - 1].last;
    for (int64_t start = first / LANES * LANES; start < last; start += LANES) {
      KeyBlock block;
      find_block<KV>(pages, table, kv_head, start, first, last, &block);
      attend_block<KV>(block, shape, state, all);
    }
    bool finite = true;
    for (int64_t i = 0; i < all; i++)
      finite &= finish_head<KV>(state[i], n, vectors, scratch.ordered.data(),
                                out + ((token - queries.first + i / group) * heads + kv_head * group + i % group) * n);
    // A value of a later token that is not finite has weight 0 for an earlier one, and 0 × NaN is NaN: each alone then.
    for (int64_t i = 0; !finite && count > 1 && i < count; i++) attend_tokens(token + i, 1, row, kv_head, scratch);
  }

  // Tokens `token` to `last` - 1, cut where a row ends or positions jump.
  void attend_tile(int64_t token, int64_t last, int64_t kv_head, AttentionScratch& scratch) const {
    while (token < last) {
      const int64_t row = batch.row_of(token);
      int64_t stop = token + 1;
      while (stop < last && stop < batch.query_starts[row + 1] &&
             batch.positions[stop] - batch.positions[token] < 2 * LANES)
        stop++;
      attend_tokens(token, stop - token, row, kv_head, scratch);
      token = stop;
    }
  }
};

template <class KV, class Q>
void paged_attention(const Pages& pages, const Batch& batch, const Queries<Q>& queries, Q* out, float scale,
                     int64_t window, int threads) {
  const Attention<KV, Q> work{pages, batch, queries, out, scale, window};
  const int64_t context = batch.max_context < window ? batch.max_context : window, last = queries.first + queries.count;
  const int64_t tiles = (queries.count + TOKEN_TILE - 1) / TOKEN_TILE;
  const bool parallel = queries.count * queries.heads * context * pages.head_dim >= SHARED_SCORES;
  share(tiles * pages.kv_heads, parallel ? threads : 1, tiles >= 16 ? 4 : 1, [&](int64_t from, int64_t to) {
    static thread_local AttentionScratch scratch;
    for (int64_t task = from; task < to; task++) {
      const int64_t token = queries.first + task / pages.kv_heads * TOKEN_TILE;
      work.attend_tile(token, token + TOKEN_TILE < last ? token + TOKEN_TILE : last, task % pages.kv_heads, scratch);
    }
  });
}
