// Softmax attention over pages in one pass: blocks of LANES keys at absolute positions 0, LANES, 2 LANES, …
//
// One task is one KV head and up to four query tokens of a row that stand close together: all their heads read a span of
// blocks of keys and values in turn, four heads at a time. A block's scores lie in the lanes of one vector, and the
// largest so far is brought up to date once a span. What is computed for a token depends on its position, its keys and
// values, and the model's shape alone: keys that only its neighbours see have weight 0 for it and change nothing.
//
// What differs by the format of pages, scores and sums of values, is in full_attention.h and int4_attention.h.
#pragma once

#include <vector>

#include "full_attention.h"
#include "int4_attention.h"
#include "threads.h"

constexpr int64_t TOKEN_TILE = 4;           // query tokens that may share a task
constexpr int64_t SHARED_SCORES = 1 << 17;  // keys × head_dim × heads from which threads pay

// Lets the largest score of `head` be at least `top`.
inline void raise_top(Head& head, float top, int64_t vectors) {
  if (!(top > head.top)) return;  // never for equal tops, where the factor would be 1
  const float fade = head.top == -INFINITY ? 0.0f : std::exp(head.top - top);
  head.total *= fade;
  head.minimum *= fade;
  for (int64_t i = 0; i < vectors; i++) head.mixed[i] *= fade;
  head.top = top;
}

// Replaces a head's scores against a span by its weights, without the values' scales.
template <class KV>
void weigh(Head& head, const KeySpan& span, int64_t vectors, vf (&scores)[SPAN]) {
  vi seen[SPAN];
  vf most = splat(-INFINITY);
  for (int b = 0; b < span.count; b++) {
    const int64_t start = span.blocks[b].start;
    seen[b] = lanes_within(within_block(head.first, start), within_block(head.last, start));
    most = larger(most, seen[b] ? scores[b] : splat(-INFINITY));
  }
  raise_top(head, largest(most), vectors);
  vf total = head.total, minimum = head.minimum;
  for (int b = 0; b < span.count; b++) {
    const vf weight = exponential(scores[b] - head.top);
    scores[b] = seen[b] ? weight : vf{};
    total += scores[b];
    if (KV::INT4) minimum = fused(scores[b], span.blocks[b].value_minimum, minimum);
  }
  head.total = total, head.minimum = minimum;
}

template <class KV, int GT>
void attend(const KeySpan& span, const Shape& shape, Head* heads) {
  vf p[GT][SPAN];
  for (int b = 0; b < span.count; b++) {
    vf scores[GT];
    KV::template score<GT>(span.blocks[b], shape, heads, scores);
    for (int g = 0; g < GT; g++) p[g][b] = scores[g];
  }
  for (int g = 0; g < GT; g++) weigh<KV>(heads[g], span, shape.chunks * KV::UNIT, p[g]);
  KV::template mix<GT>(span, shape, heads, p);
}

// evens | odds, chunk by chunk → [a0, a1, …]
inline void join_pairs(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i++) out[i] = x[i / (2 * LANES) * (2 * LANES) + i % 2 * LANES + i / 2 % LANES];
}

struct AttentionScratch {
  std::vector<vf> queries, mixed, ordered;
  std::vector<vbytes> codes;
  std::vector<Head> heads;
};

// The state of head number `i` of a task before its first block; of one token's query [n].
template <class KV, class Q>
Head new_head(const Q* query, int64_t n, float scale, int64_t i, int64_t chunks, AttentionScratch& scratch) {
  const int64_t vectors = chunks * KV::UNIT;
  vf* x = KV::INT4 ? scratch.ordered.data() : scratch.queries.data() + i * vectors;
  x[vectors - 1] = vf{};
  load_padded(x, query, n);
  if (KV::INT4) rotate(x, n);
  for (int64_t k = 0; k * LANES < n; k++) x[k] *= scale;
  Head head{KV::INT4 ? nullptr : x, nullptr, scratch.mixed.data() + i * vectors, vf{}, vf{}, -INFINITY, 0, 0, 0, 0};
  if (KV::INT4) Int4Pages::round_query(x, chunks, scratch.codes.data() + i * chunks * Int4Pages::PARTS, &head);
  return head;
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
void attend_span(const KeySpan& span, const Shape& shape, Head* heads, int64_t count) {
  int64_t g = 0;
  for (; g + 4 <= count; g += 4) attend<KV, 4>(span, shape, heads + g);
  if (count - g == 3) attend<KV, 3>(span, shape, heads + g);
  if (count - g == 2) attend<KV, 2>(span, shape, heads + g);
  if (count - g == 1) attend<KV, 1>(span, shape, heads + g);
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
    (KV::INT4 ? scratch.ordered : scratch.queries).resize(size_t((KV::INT4 ? 1 : all) * vectors));
    if (KV::INT4) scratch.codes.resize(size_t(all * shape.chunks * Int4Pages::PARTS));
    scratch.mixed.assign(size_t(all * vectors), vf{});
    scratch.heads.resize(size_t(all));
    Head* state = scratch.heads.data();
    for (int64_t i = 0; i < all; i++) {
      const int64_t t = token + i / group, h = kv_head * group + i % group, position = batch.positions[t];
      state[i] = new_head<KV>(queries.data + t * queries.stride + h * n, n, scale, i, shape.chunks, scratch);
      state[i].first = position - window + 1 > 0 ? position - window + 1 : 0;
      state[i].last = position + 1;
    }
    const int32_t* table = batch.page_tables + row * batch.table_width;
    const int64_t first = state[0].first, last = state[all - 1].last;
    int64_t start = first / LANES * LANES;
    KeyPlace place = place_of(table, start, pages.page_tokens);
    while (start < last) {
      KeySpan span;
      span.count = 0;
      do {
        find_block(pages, place, kv_head, start, first, last, &span.blocks[span.count++]);
        start += LANES, place = place.after(LANES, pages.page_tokens);
      } while (start < last && start % (SPAN * LANES) != 0);
      attend_span<KV>(span, shape, state, all);
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
