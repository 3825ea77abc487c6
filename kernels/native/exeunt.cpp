// The native kernels of Exeunt: plain C functions over raw pointers, called through ctypes.
//
// Compiled on first use (kernels/native/build.py). Tensors are dense in their last dimension; dtype codes are
// 0 float32, 1 bfloat16, 2 float16. No function allocates what outlives it beyond scratch kept per thread, and but for
// `exeunt_model_pass` none fails: Python checks shapes and dtypes before it calls. Nobody checks the values of slots,
// positions and page tables: whoever makes a batch answers for their lying inside the pages and the rotation's table.
#include <new>
#include <type_traits>

#include "blocks.h"
#include "draw.h"
#include "exit_gate.h"
#include "model_pass.h"
#include "row_parts.h"

template <class Function>
static void with_dtype(int dtype, Function&& function) {
  if (dtype == 0) function((float*)nullptr);
  if (dtype == 1) function((bf16*)nullptr);
  if (dtype == 2) function((half*)nullptr);
}

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

EXPORTED int exeunt_lanes() { return LANES; }

// x [rows, inputs], y [rows, outputs] and bias [outputs] or null, all of one dtype.
EXPORTED void exeunt_int4_linear(void* y, const void* x, const void* panels, const void* bias, int64_t rows,
                        int64_t inputs, int64_t outputs, int64_t group_size, int dtype, int threads) {
  Groups groups{inputs, group_size, (inputs + group_size - 1) / group_size};
  with_dtype(dtype, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    int4_linear((T*)y, (const T*)x, rows, (const uint8_t*)panels, groups, outputs, (const T*)bias, threads);
  });
}

// keys and values [tokens, kv_heads, head_dim] with the given strides between tokens (in elements).
EXPORTED void exeunt_write_kv(const Pages* pages, const void* keys, const void* values, int64_t key_stride,
                     int64_t value_stride, const int64_t* slots, int64_t tokens, int dtype, int threads) {
  with_dtype(dtype, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    write_kv(*pages, (const T*)keys, (const T*)values, key_stride, value_stride, slots, tokens, threads);
  });
}

// queries [tokens, heads, head_dim] with `query_stride` elements between tokens, out the same, dense. Full pages are
// of the queries' dtype.
EXPORTED void exeunt_paged_attention(void* out, const void* queries, const Pages* pages, const Batch* batch,
                            int64_t query_stride, int64_t tokens, int64_t heads, int64_t window, float scale,
                            int dtype, int threads) {
  with_dtype(dtype, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    const Queries<T> asked{(const T*)queries, query_stride, heads, 0, tokens};
    if (pages->int4())
      paged_attention<Int4Pages>(*pages, *batch, asked, (T*)out, scale, window, threads);
    else
      paged_attention<FullPages<T>>(*pages, *batch, asked, (T*)out, scale, window, threads);
  });
}

// x [rows, n] with `stride` elements between rows, weight [n], y [rows, n].
EXPORTED void exeunt_rms_norm(void* y, const void* x, const void* weight, int64_t rows, int64_t n, int64_t stride,
                              float eps, int dtype) {
  with_dtype(dtype, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    rms_norm((T*)y, (const T*)x, (const T*)weight, rows, n, stride, eps);
  });
}

// x [rows, size] to state [rows, size] and logits [rows]; scratch: rows * size values of the dtype, and
// rows * (size + units) floats.
EXPORTED void exeunt_exit_state(void* state, float* logits, const void* x, const ExitWeights* weights, int64_t rows,
                                void* scratch, float* wide, int dtype, int threads) {
  with_dtype(dtype, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    exit_state((T*)state, logits, (const T*)x, *weights, rows, (T*)scratch, wide, threads);
  });
}

// x [rows, size] and thresholds [rows] to decisions, and how many rows were looked at, projected and leave to `counts`.
// Scratch and wide hold a row what kernels/native/exit_gate.h says.
EXPORTED void exeunt_exit_gate(const Decisions* out, Counts* counts, const void* x, const float* thresholds,
                               const Gate* gate, int64_t rows, void* scratch, float* wide, int dtype, int threads) {
  with_dtype(dtype, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    *counts = shared_exit_gate(*out, (const T*)x, thresholds, *gate, rows, (T*)scratch, wide, threads);
  });
}

// logits [rows, n], probe [rows] and units [rows, judge->units], which only a judge reads, to out [rows].
EXPORTED void exeunt_gate_confidence(float* out, const float* logits, const float* probe, const float* units,
                                     const Judge* judge, const float* weights, int64_t rows, int64_t n,
                                     float least_doubt, int threads) {
  gate_confidence(out, logits, probe, units, *judge, weights, rows, n, least_doubt, threads);
}

EXPORTED void exeunt_draw(int64_t* ids, float* logprobs, const float* logits, const float* scores, int64_t rows,
                          int64_t n, const float* temperatures, const int32_t* keys, const int32_t* token_keys,
                          int threads) {
  draw_rows(ids, logprobs, logits, scores, rows, n, temperatures, keys, token_keys, threads);
}

// x [rows, inputs], weight [outputs, inputs], y [rows, outputs] and bias [outputs] or null, all of one dtype.
EXPORTED void exeunt_full_linear(void* y, const void* x, const void* weight, const void* bias, int64_t rows,
                                 int64_t inputs, int64_t outputs, int dtype, int threads) {
  with_dtype(dtype, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    full_linear((T*)y, (const T*)x, rows, (const T*)weight, inputs, outputs, (const T*)bias, threads);
  });
}

// hidden [tokens, hidden] is replaced by the state behind `count` blocks; rotation is null without rotary embedding,
// else [positions, 2, head_dim] cosines and signed sines. Tokens pass in tiles of at most `tile`. Scratch holds each
// token's queries, keys and values, then for each token of the largest tile twice the hidden size, the larger of the
// queries and the inner size, and the widest projection.
EXPORTED void exeunt_run_blocks(void* hidden, int64_t tokens, const BlockShape* shape, const BlockParts* blocks,
                                const Pages* const* pages, int64_t count, const Batch* batch, const int64_t* slots,
                                const void* rotation, void* scratch, int64_t tile, int dtype, int threads) {
  with_dtype(dtype, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    const BlockRun<T> work(*shape, *batch, slots, rotation, tokens, tile, threads, scratch);
    run_blocks(work, blocks, pages, count, (T*)hidden);
  });
}

// A pass through a whole model; rotation as above, pages of every block. Returns 0, the batch's fault, with which nothing
// is done, or -1 where there is no memory for what lies between.
EXPORTED int exeunt_model_pass(const PassModel* model, const Pages* const* pages, const void* rotation,
                               const PassBatch* batch, const PassResult* out, int64_t tile, int dtype, int threads) {
  const int fault = batch->fault(*model);
  if (fault) return fault;
  try {
    with_dtype(dtype, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      ModelPass<T>(*model, pages, rotation, *batch, *out, tile, threads).pass();
    });
  } catch (const std::bad_alloc&) {
    return -1;
  }
  return 0;
}

// Writes the keys and values that `count` blocks make of hidden [tokens, hidden]; scratch as above.
EXPORTED void exeunt_project_kv(const void* hidden, int64_t tokens, const BlockShape* shape, const BlockParts* blocks,
                                const Pages* const* pages, int64_t count, const Batch* batch, const int64_t* slots,
                                const void* rotation, void* scratch, int64_t tile, int dtype, int threads) {
  with_dtype(dtype, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    const BlockRun<T> work(*shape, *batch, slots, rotation, tokens, tile, threads, scratch);
    for (int64_t b = 0; b < count; b++) work.project_kv(blocks[b], pages[b], (const T*)hidden);
  });
}
}
