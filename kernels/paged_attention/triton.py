"""Attention over paged keys and values on a GPU, in Triton: one kernel for decode, backfill and prefill.

A program takes a few neighbouring tokens of one row, with all query heads that share one KV head: up to 16 rows of a
tensor core's tile. It reads keys in blocks at absolute multiples of the block's size and keeps a running softmax
within a split: a run of keys that begins at an absolute multiple of the split's size. Splits are folded together in
ascending order. Where there is little to do besides, programs share a row's splits, leave each one's sums in memory
and a second kernel folds them; else a program folds its own as it goes. The arithmetic is the same, operation by
operation: no fused multiply-adds but the tensor cores' own, so that what is computed for a token depends on its own
queries and keys alone, to the bit.

A block whose keys all of a program's tokens see is read plainly. At the edges (the last keys, a window's first ones)
what a token does not see is masked: it may be unwritten memory, or another token's infinity.
"""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import math
from dataclasses import dataclass
from typing import Final

import torch
import triton
from torch import Tensor

from exeunt.kernels.paged_attention.attend_triton import attention_kernel
from exeunt.kernels.paged_attention.fold_triton import fold_kernel
from exeunt.kernels.paged_batch import KVBlock, PagedBatch
from exeunt.kernels.write_kv.triton import rotate_heads_triton


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """What decides the order of summation, and so the bits (keys and tiles), and what only decides the speed."""

    split: int = 512  # keys whose sums one program keeps to itself; a power of two
    tile_bytes: int = 16384  # of the keys that are read at once, in the full format
    most_keys: int = 64  # of those
    int4_tile_bytes: int = (
        32768  # the same of INT4 keys, unpacked: their programs are bound by instructions, not loads
    )
    int4_most_keys: int = 128
    num_warps: int = 4
    # pipeline stages: keys and values are read half as many blocks ahead, their pages as many again
    stages: int = 5
    programs: int = 2048  # splits are shared out until a launch has about so many
    scratch_bytes: int = 128 << 20  # beyond so many bytes of partial sums, programs fold their own splits


TILES: Final = AttentionTiles()
_TILE_ROWS: Final = 16
_LOG2_E: Final = math.log2(math.e)


def paged_attention_triton(
    queries: Tensor,
    block: KVBlock,
    batch: PagedBatch,
    scale: float,
    window: int | None = None,
    *,
    rotated: bool = False,
) -> Tensor:
    """Return the attention of queries [tokens, heads, head_dim]; see `exeunt.kernels.paged_attention`.

    `rotated` says that queries over INT4 pages are Hadamard-rotated already, as `turn_and_write_kv` returns them.
    A token at position -1 attends to nothing and gets zeros.
    """
    key_params, value_params = block.key_params, block.value_params
    if key_params is not None and value_params is not None:
        if not rotated:
            queries = rotate_heads_triton(queries)
        # a token's scale and minimum as one word: one load of four bytes
        key_params, value_params = key_params.view(torch.int32), value_params.view(torch.int32)
    if queries.stride(-1) != 1:
        queries = queries.contiguous()
    out: Tensor = _paged_attention(
        queries,
        block.keys,
        block.values,
        key_params,
        value_params,
        batch.positions,
        batch.query_starts,
        batch.page_tables,
        batch.max_context,
        scale,
        window or 0,
    )
    return out


@torch.library.custom_op("exeunt::paged_attention", mutates_args=())
def _paged_attention(
    queries: Tensor,
    page_keys: Tensor,
    page_values: Tensor,
    key_params: Tensor | None,
    value_params: Tensor | None,
    positions: Tensor,
    query_starts: Tensor,
    page_tables: Tensor,
    max_context: int,
    scale: float,
    window: int,
) -> Tensor:
    out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    tokens, heads, head_dim = queries.shape
    rows, kv_heads = page_tables.shape[0], page_keys.shape[1]
    if tokens == 0:
        return out
    if rows == 0 or max_context < 1:  # nothing but padding
        return out.zero_()
    int4 = key_params is not None
    group = heads // kv_heads
    tile_rows = max(_TILE_ROWS, triton.next_power_of_2(group))
    block_tokens = tile_rows // group
    blocks = tokens // block_tokens + rows
    splits = triton.cdiv(max_context, TILES.split)
    sharing = _programs_sharing(splits, blocks * kv_heads, tokens * heads * (head_dim + 2) * 4)
    shared = sharing > 1
    scratch = (tokens, heads, splits) if shared else (0, 0, 0)
    sums = torch.empty((*scratch, head_dim), dtype=torch.float32, device=queries.device)
    # each split's largest score and its sum of exponentials
    stats = torch.empty((*scratch, 2), dtype=torch.float32, device=queries.device)
    dims = max(16, triton.next_power_of_2(head_dim))
    half_dims = max(16, triton.next_power_of_2((head_dim + 1) // 2))
    pages = {"K": page_keys, "V": page_values, "KP": key_params, "VP": value_params}
    strides = {
        f"{name}_{part}": 0 if tensor is None else tensor.stride(index)
        for name, tensor in pages.items()
        for index, part in enumerate(("PAGE", "HEAD", "TOKEN"))
    }
    attention_kernel[(blocks, kv_heads, sharing)](
        out,
        sums,
        stats,
        queries,
        page_keys,
        page_values,
        key_params,
        value_params,
        positions,
        query_starts,
        page_tables,
        tokens,
        rows,
        splits,
        queries.stride(0),
        queries.stride(1),
        positions.stride(0),
        page_tables.stride(0),
        scale * _LOG2_E,
        window,
        HEADS=heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_TOKENS=page_keys.shape[2],
        DIMS=half_dims if int4 else dims,
        TILE_ROWS=tile_rows,
        BLOCK_TOKENS=block_tokens,
        BLOCK_KEYS=_block_keys(dims, queries.element_size(), int4),
        SPLIT=TILES.split,
        SHARED=shared,
        INT4=int4,
        WINDOWED=window > 0,
        STAGES=TILES.stages,
        **strides,
        num_warps=TILES.num_warps,
        num_stages=TILES.stages,
        enable_fp_fusion=False,
    )
    if shared:
        fold_kernel[(tokens, heads)](
            out,
            sums,
            stats,
            positions,
            splits,
            positions.stride(0),
            window,
            HEADS=heads,
            HEAD_DIM=head_dim,
            DIMS=dims,
            SPLIT=TILES.split,
            WINDOWED=window > 0,
            num_warps=1,
            num_stages=1,
            enable_fp_fusion=False,
        )
    return out


@_paged_attention.register_fake
def _(
    queries: Tensor,
    page_keys: Tensor,
    page_values: Tensor,
    key_params: Tensor | None,
    value_params: Tensor | None,
    positions: Tensor,
    query_starts: Tensor,
    page_tables: Tensor,
    max_context: int,
    scale: float,
    window: int,
) -> Tensor:
    return torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)


def _programs_sharing(splits: int, programs: int, split_bytes: int) -> int:
    """Programs among which a row's splits are dealt out; 1 where each folds all of its own."""
    if splits * split_bytes > TILES.scratch_bytes:
        return 1
    return min(splits, -(-TILES.programs // programs))


def _block_keys(dims: int, itemsize: int, int4: bool) -> int:
    """Keys read at once: by head size, dtype and format only."""
    room, most = (
        (TILES.int4_tile_bytes, TILES.int4_most_keys) if int4 else (TILES.tile_bytes, TILES.most_keys)
    )
    return max(16, min(most, room // (dims * itemsize)))
