// Whole transformer blocks, one after the other, in one call: what a stage of the model is between two exits.
//
// It strings the other kernels together as compression/block.py does, over scratch that the caller gives; in 16 bits
// every intermediate result is rounded to the model's dtype where that file's tensors would be.
#pragma once

#include "full_linear.h"
#include "int4_linear.h"
#include "paged_attention.h"
#include "rows.h"
#include "write_kv.h"

// The structs are those of kernels/blocks/native.py, field by field.
struct Matrix {  // group_size 0: weight is [outputs, inputs] in the model's dtype; else INT4 panels
  const void *weight, *bias;
  int64_t group_size, inputs, outputs;
};

struct NormWeights {
  const void *weight, *bias;  // bias null for an RMS norm
};

struct BlockParts {
  int64_t is_linear_map;  // then only qkv (V) and out (U, with bias) are there: h + U (V h) + b
  NormWeights attention_norm, mlp_norm;
  const void* head_norm;  // [heads + kv_heads, head_dim] or null
  Matrix qkv, out, up, down;
  int64_t window;
  double scale;
};

enum Activation : int64_t { SILU, GELU_TANH, GELU, RELU };

struct BlockShape {
  int64_t hidden, heads, kv_heads, head_dim, inner, gated, activation, layer_norm;
  double eps;
  int64_t widest;     // values per token of the widest projection
  int64_t own_rows_work;  // multiplications of a run from which threads may take rows by themselves; tests lower it

  int64_t queries() const { return heads * head_dim; }
  int64_t keys() const { return kv_heads * head_dim; }
  int64_t projected() const { return queries() + 2 * keys(); }
  // Values per token of a tile that lie between a block's operations, beside the projected ones.
  int64_t between() const { return 2 * hidden + (queries() > inner ? queries() : inner) + widest; }
};

constexpr int64_t SHARED_ROW_VALUES = 1 << 16;  // values of row operations from which threads pay

inline vf activated(vf x, int64_t activation) {
  if (activation == RELU) return larger(x, vf{});
  if (activation == GELU) {
    vf y;
    for (int i = 0; i < LANES; i++) y[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678118654752f));
    return y;
  }
  // tanh form of GELU: x times the sigmoid of 2 √(2/π) (x + 0.044715 x³)
  vf power = activation == SILU ? -x : -1.5957691216057308f * fused(x * x * x, splat(0.044715f), x);
  power = power > 88.0f ? splat(88.0f) : power;
  return x / (exponential(power) + 1.0f);
}

template <class T>
void layer_norm(T* y, const T* x, const T* weight, const T* bias, int64_t n, float eps) {
  vf total{}, squares{};
  for (int64_t i = 0; i < n; i += LANES) total += load(x + i, vector_at(i, n));
  const float mean = sum(total) / float(n);
  for (int64_t i = 0; i < n; i += LANES) {
    const int count = vector_at(i, n);
    vf off = load(x + i, count) - mean;
    if (count < LANES)
      for (int l = count; l < LANES; l++) off[l] = 0;
    squares = fused(off, off, squares);
  }
  const float scale = 1.0f / std::sqrt(sum(squares) / float(n) + eps);
  for (int64_t i = 0; i < n; i += LANES) {
    const int count = vector_at(i, n);
    vf v = (load(x + i, count) - mean) * scale * load(weight + i, count);
    store(y + i, bias ? v + load(bias + i, count) : v, count);
  }
}

// y [rows, …] holds the matrix's outputs from `first` on behind as many others as the result says.
template <class T>
int64_t matrix_product(const Matrix& m, const T* x, T* y, int64_t rows, int64_t first, int threads) {
  const T* bias = (const T*)m.bias;
  if (m.group_size == 0) {
    full_linear(y, x, rows, (const T*)m.weight + first * m.inputs, m.inputs, m.outputs - first,
                bias ? bias + first : nullptr, threads);
    return 0;
  }
  const Groups groups{m.inputs, m.group_size, (m.inputs + m.group_size - 1) / m.group_size};
  const int64_t panel = first / LANES, from = panel * LANES;
  int4_linear(y, x, rows, (const uint8_t*)m.weight + panel * groups.panel_bytes(), groups, m.outputs - from,
              bias ? bias + from : nullptr, threads);
  return first - from;
}

struct Tile {  // tokens that pass a part of a block together
  int64_t first, count;
};

// A pass over a long text goes through a block in tiles of `tile` tokens, so that what lies between its operations
// stays in the caches: first norm, projection and keys and values of all tiles, so that a token may attend to those of
// any other in its row, then the rest of the block. A row's bits do not depend on its tile.
template <class T>
struct BlockRun {
  const BlockShape& shape;
  const Batch& batch;
  const int64_t* slots;
  const T* rotation;  // [positions, 2, head_dim]: cosines and signed sines; null without rotary embedding
  int64_t tokens, tile;
  int threads;
  T* qkv;                            // scratch [tokens, projected]
  T *normed, *delta, *mixed, *wide;  // scratch of a tile: [hidden] twice, the larger of queries and inner, the widest

  BlockRun(const BlockShape& shape_, const Batch& batch_, const int64_t* slots_, const void* rotation_,
           int64_t tokens_, int64_t tile_, int threads_, void* scratch)
      : shape(shape_), batch(batch_), slots(slots_), rotation((const T*)rotation_), tokens(tokens_),
        tile(tile_ < tokens_ ? tile_ : tokens_), threads(threads_), qkv((T*)scratch),
        normed(qkv + tokens * projected()), delta(normed + tile * shape.hidden), mixed(delta + tile * shape.hidden),
        wide(mixed + tile * (queries() > shape.inner ? queries() : shape.inner)) {}

  // The same for tokens `first` to `first` + `count` - 1 of a pass of one tile, which are those of `its_batch`, for one
  // thread, in their part of the scratch.
  BlockRun of(const Batch& its_batch, int64_t first, int64_t count) const {
    return BlockRun(shape, its_batch, slots + first, rotation, count, count, 1,
                    qkv + first * (projected() + shape.between()));
  }

  int64_t queries() const { return shape.queries(); }
  int64_t keys() const { return shape.keys(); }
  int64_t projected() const { return shape.projected(); }

  template <class Body>
  void each_tile(const Body& body) const {
    for (int64_t first = 0; first < tokens; first += tile)
      body(Tile{first, first + tile < tokens ? tile : tokens - first});
  }

  template <class Body>
  void each_row(Tile at, int64_t width, const Body& body) const {  // rows counted within the tile
    share(at.count, at.count * width >= SHARED_ROW_VALUES ? threads : 1, 16, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; t++) body(t);
    });
  }

  int64_t linear(Tile at, const Matrix& m, const T* x, T* y, int64_t first = 0) const {
    return matrix_product(m, x, y, at.count, first, threads);
  }

  void norm(Tile at, const NormWeights& weights, const T* hidden) const {
    const int64_t n = shape.hidden;
    const T* x = hidden + at.first * n;
    each_row(at, n, [&](int64_t t) {
      if (shape.layer_norm)
        layer_norm(normed + t * n, x + t * n, (const T*)weights.weight, (const T*)weights.bias, n, float(shape.eps));
      else
        rms_norm(normed + t * n, x + t * n, (const T*)weights.weight, 1, n, n, float(shape.eps));
    });
  }

  void add(Tile at, T* hidden) const {
    const int64_t n = shape.hidden;
    each_row(at, n, [&](int64_t t) {
      T* state = hidden + (at.first + t) * n;
      for (int64_t i = 0; i < n; i += LANES) {
        const int count = vector_at(i, n);
        store(state + i, load(state + i, count) + load(delta + t * n + i, count), count);
      }
    });
  }

  // Norms and turns `heads` heads of each token; `heads_norm` are their weights or null.
  void turn(Tile at, T* x, int64_t heads, int64_t stride, const T* heads_norm) const {
    const int64_t n = shape.head_dim;
    each_row(at, heads * n, [&](int64_t t) {
      T* token = x + t * stride;
      if (heads_norm)
        for (int64_t h = 0; h < heads; h++)
          rms_norm(token + h * n, token + h * n, heads_norm + h * n, 1, n, n, float(shape.eps));
      if (rotation) {
        const T* table = rotation + batch.positions[at.first + t] * 2 * n;
        rotate_heads(token, table, table + n, heads, n);
      }
    });
  }

  void write(Tile at, const Pages& pages, const T* x, int64_t stride) const {
    write_kv(pages, x, x + keys(), stride, stride, slots + at.first, at.count, threads);
  }

  void project(Tile at, const BlockParts& block, const Pages& pages, const T* hidden) const {
    T* x = qkv + at.first * projected();
    norm(at, block.attention_norm, hidden);
    linear(at, block.qkv, normed, x);
    turn(at, x, shape.heads + shape.kv_heads, projected(), (const T*)block.head_norm);
    write(at, pages, x + queries(), projected());
  }

  void attend(Tile at, const BlockParts& block, const Pages& pages) const {
    const Queries<T> asked{qkv, projected(), shape.heads, at.first, at.count};
    if (pages.int4())
      paged_attention<Int4Pages>(pages, batch, asked, mixed, float(block.scale), block.window, threads);
    else
      paged_attention<FullPages<T>>(pages, batch, asked, mixed, float(block.scale), block.window, threads);
  }

  void activate(Tile at) const {
    const int64_t n = shape.inner, stride = shape.gated ? 2 * n : n;
    each_row(at, n, [&](int64_t t) {
      const T* x = wide + t * stride;
      T* y = mixed + t * n;
      for (int64_t i = 0; i < n; i += LANES) {
        const int count = vector_at(i, n);
        vf active = activated(load(x + i, count), shape.activation);
        store(y + i, shape.gated ? as_stored<T>(active) * load(x + n + i, count) : active, count);
      }
    });
  }

  void run(const BlockParts& block, const Pages* pages, T* hidden) const {
    if (block.is_linear_map) {
      each_tile([&](Tile at) {
        linear(at, block.qkv, hidden + at.first * shape.hidden, wide);
        linear(at, block.out, wide, delta);
        add(at, hidden);
      });
      return;
    }
    each_tile([&](Tile at) { project(at, block, *pages, hidden); });
    each_tile([&](Tile at) {
      attend(at, block, *pages);
      linear(at, block.out, mixed, delta);
      add(at, hidden);
      norm(at, block.mlp_norm, hidden);
      linear(at, block.up, normed, wide);
      activate(at);
      linear(at, block.down, mixed, delta);
      add(at, hidden);
    });
  }

  // Only the keys and values that the block makes of `hidden`; a linear map has none.
  void project_kv(const BlockParts& block, const Pages* pages, const T* hidden) const {
    if (block.is_linear_map) return;
    each_tile([&](Tile at) {
      norm(at, block.attention_norm, hidden);
      const int64_t skipped = linear(at, block.qkv, normed, wide, queries()), stride = skipped + 2 * keys();
      const T* heads_norm = (const T*)block.head_norm;
      turn(at, wide + skipped, shape.kv_heads, stride, heads_norm ? heads_norm + queries() : nullptr);
      write(at, *pages, wide + skipped, stride);
    });
  }
};
