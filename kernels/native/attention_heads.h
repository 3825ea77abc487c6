// What attention over pages goes by: the state of a query head, and blocks of LANES keys at absolute positions.
#pragma once

#include "byte_dots.h"
#include "pages.h"

struct KeyBlock {  // of LANES keys; places where none is may be read and have weight 0
  const char* keys[LANES];
  const char* values[LANES];
  vf key_scale, key_minimum, value_scale, value_minimum;  // of INT4 pages; 0 for keys that are not there
  int64_t start;  // position of lane 0
  bool adjacent;  // keys lie one behind the other, LANES bytes each, and so do values
};

constexpr int SPAN = 8;  // blocks whose largest score is looked for at once; spans begin at multiples of SPAN × LANES

struct KeySpan {
  KeyBlock blocks[SPAN];
  int count;
};

struct Shape {            // of one key: elements (full) or bytes (INT4), LANES to a load
  int64_t chunks, whole;  // loads, and those of them that are full
  int rest;               // values of the last one, where it is not
};

struct Head {  // the state of one query head
  const vf* query;      // over full pages: its values
  const vbytes* codes;  // over INT4 pages: its values as whole numbers, times query_step
  vf* mixed;            // Σ p v so far
  vf total, minimum;    // Σ p and Σ p m by lane
  float top, query_step, query_sum;
  int64_t first, last;  // it sees keys first .. last - 1
};

inline int within_block(int64_t key, int64_t start) {
  return int(key <= start ? 0 : key - start < LANES ? key - start : LANES);
}

inline vi lanes_within(int first, int last) {  // -1 in lanes first .. last - 1, 0 in the others
  vi lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  return (lane >= first) & (lane < last);
}

inline void read_params(vu pairs, vi there, vf* scale, vf* minimum) {
  pairs &= (vu)there;
  *scale = from_half(low_halves((vi)pairs));
  *minimum = from_half(low_halves((vi)(pairs >> 16)));
}

struct KeyPlace {  // where a key lies, or would
  const int32_t* page;  // in the row's page table
  int64_t place;        // on it

  // The place `count` keys further on, of which a page holds `page_tokens`.
  KeyPlace after(int64_t count, int64_t page_tokens) const {
    KeyPlace next{page, place + count};
    for (; next.place >= page_tokens; next.place -= page_tokens) next.page++;
    return next;
  }
};

inline KeyPlace place_of(const int32_t* table, int64_t position, int64_t page_tokens) {
  return {table + position / page_tokens, position % page_tokens};
}

// Keys of a block from lane `from` to `to` - 1, in runs that lie together on a page.
struct KeyRuns {
  int64_t head, page_tokens;
  KeyPlace place;  // of lane `from`
  int from, to;

  template <class Body>
  void each(const PagedTensor& tensor, const Body& body) const {  // body(first lane, how many, where)
    KeyPlace at = place;
    for (int lane = from; lane < to;) {
      const int64_t left = page_tokens - at.place;
      const int count = int(left < to - lane ? left : to - lane);
      body(lane, count, tensor.at(*at.page, head, at.place));
      lane += count, at.page++, at.place = 0;
    }
  }

  void spread(const PagedTensor& tensor, const char** places) const {
    if (from == 0 && to == LANES && place.place + LANES <= page_tokens) {
      const char* first = tensor.at(*place.page, head, place.place);
#pragma GCC unroll 16
      for (int k = 0; k < LANES; k++, first += tensor.token) places[k] = first;
      return;
    }
    each(tensor, [&](int lane, int count, const char* first) {
      for (int k = 0; k < count; k++, first += tensor.token) places[lane + k] = first;
    });
    for (int k = 0; k < from; k++) places[k] = places[from];  // stand for keys that are not there
    for (int k = to; k < LANES; k++) places[k] = places[to - 1];
  }

  vu params(const PagedTensor& tensor) const {
    uint32_t both[LANES] = {};
    each(tensor, [&](int lane, int count, const char* first) {
      for (int k = 0; k < count; k++) memcpy(both + lane + k, first + k * tensor.token, 4);
    });
    return loaded<vu>(both);
  }
};

// The block of keys `first` to `last` - 1 that begins at position `start` of a row, which is at `from`. Full pages may
// hold NaN where no key was written, and 0 × NaN is NaN: there a key that is there stands in.
inline void find_block(const Pages& pages, KeyPlace from, int64_t head, int64_t start, int64_t first, int64_t last,
                       KeyBlock* found) {
  KeyBlock& block = *found;
  const int begin = within_block(first, start), end = within_block(last, start);
  block.start = start;
  const bool int4 = pages.int4();
  const bool one_page = from.place + LANES <= pages.page_tokens && (int4 || end - begin == LANES);
  const KeyRuns runs{head, pages.page_tokens, one_page ? from : from.after(begin, pages.page_tokens),
                     one_page ? 0 : begin, one_page ? LANES : end};
  runs.spread(pages.keys, block.keys);
  runs.spread(pages.values, block.values);
  block.adjacent = one_page && int4 && pages.head_dim == 2 * LANES && pages.keys.token == LANES &&
                   pages.values.token == LANES;
  if (!int4) return;
  const bool dense = one_page && pages.key_params.token == 4 && pages.value_params.token == 4;
  const vi there = lanes_within(begin, end);
  const auto pairs = [&](const PagedTensor& params) {
    return dense ? loaded<vu>(params.at(*from.page, head, from.place)) : runs.params(params);
  };
  read_params(pairs(pages.key_params), there, &block.key_scale, &block.key_minimum);
  read_params(pairs(pages.value_params), there, &block.value_scale, &block.value_minimum);
  block.value_minimum = fused(block.value_scale, splat(8.0f), block.value_minimum);  // their codes count from -8 on
}
