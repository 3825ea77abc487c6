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
# ruff: noqa: N803, N806

import math
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    _attention_kernel[(blocks, kv_heads, sharing)](
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
        UNPACK=_unpacking(queries) if int4 else 0,
        WIDE=not queries.is_cuda,
        STAGES=TILES.stages,
        **strides,
        num_warps=TILES.num_warps,
        num_stages=TILES.stages,
        enable_fp_fusion=False,
    )
    if shared:
        _fold_kernel[(tokens, heads)](
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


def _unpacking(queries: Tensor) -> int:
    """How codes become numbers: 0 plainly, 1 by bfloat16 and 2 by float16 instructions, on a GPU."""
    if not queries.is_cuda:
        return 0
    return {torch.bfloat16: 1, torch.float16: 2}.get(queries.dtype, 0)


@triton.jit(do_not_specialize=["tokens", "rows", "splits", "window", "table_stride"])
def _attention_kernel(
    out,
    partial_sums,
    partial_stats,
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
    query_stride,
    query_head_stride,
    position_stride,
    table_stride,
    scale,
    window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    DIMS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    SHARED: tl.constexpr,
    INT4: tl.constexpr,
    WINDOWED: tl.constexpr,
    UNPACK: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    K_PAGE: tl.constexpr,
    K_HEAD: tl.constexpr,
    K_TOKEN: tl.constexpr,
    V_PAGE: tl.constexpr,
    V_HEAD: tl.constexpr,
    V_TOKEN: tl.constexpr,
    KP_PAGE: tl.constexpr,
    KP_HEAD: tl.constexpr,
    KP_TOKEN: tl.constexpr,
    VP_PAGE: tl.constexpr,
    VP_HEAD: tl.constexpr,
    VP_TOKEN: tl.constexpr,
):
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = _row_of(query_starts, block, rows, BLOCK_TOKENS)
    row_start = tl.load(query_starts + row)
    # Tokens behind the last row's end, if any, are padding at position -1: the last row writes their zeros.
    row_stop = tl.where(row == rows - 1, tokens, tl.load(query_starts + row + 1))
    first_token = row_start + (block - row_start // BLOCK_TOKENS - row) * BLOCK_TOKENS
    if first_token >= row_stop:
        return

    lanes = tl.arange(0, TILE_ROWS)
    token = first_token + lanes // GROUP
    present = (lanes < BLOCK_TOKENS * GROUP) & (token < row_stop)
    token = tl.where(present, token, first_token)
    head = kv_head * GROUP + lanes % GROUP
    position = tl.load(positions + token * position_stride, mask=present, other=-1).to(tl.int32)
    # where the tile's tokens stop seeing keys, and where all of them see them
    stop = tl.max(position, axis=0) + 1
    seen_by_all = tl.min(tl.where(present, position, stop), axis=0) + 1
    first = 0
    all_from = 0
    if WINDOWED:
        lowest = tl.min(tl.where(position >= 0, position, stop), axis=0)
        first = tl.maximum(lowest - window + 1, 0)
        all_from = tl.maximum(stop - window, 0)

    query_row = queries + token.to(tl.int64) * query_stride + head * query_head_stride
    dims = tl.arange(0, DIMS)
    WIDTH: tl.constexpr = HEAD_DIM // 2 if INT4 else HEAD_DIM
    inside = present[:, None] & (dims[None, :] < WIDTH)
    if INT4:
        query = tl.load(query_row[:, None] + 2 * dims[None, :], mask=inside, other=0.0)
        odd_query = tl.load(query_row[:, None] + 2 * dims[None, :] + 1, mask=inside, other=0.0)
        query_sum = tl.sum(query.to(tl.float32), axis=1) + tl.sum(odd_query.to(tl.float32), axis=1)
    else:
        query = tl.load(query_row[:, None] + dims[None, :], mask=inside, other=0.0)
        odd_query = query
        query_sum = tl.zeros((TILE_ROWS,), tl.float32)

    table = page_tables + row.to(tl.int64) * table_stride
    k_head = page_keys + kv_head.to(tl.int64) * K_HEAD
    v_head = page_values + kv_head.to(tl.int64) * V_HEAD
    kp_head = key_params
    vp_head = value_params
    if INT4:
        kp_head = key_params + kv_head.to(tl.int64) * KP_HEAD
        vp_head = value_params + kv_head.to(tl.int64) * VP_HEAD

    largest = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((TILE_ROWS,), tl.float32)
    total = tl.zeros((TILE_ROWS, DIMS), tl.float32)
    odd_total = tl.zeros((TILE_ROWS, DIMS), tl.float32)
    first_split = first // SPLIT
    if SHARED:
        first_split += tl.program_id(2)
    step = tl.num_programs(2)
    for split in range(first_split, tl.cdiv(stop, SPLIT), step):
        low = tl.maximum(split * SPLIT, first // BLOCK_KEYS * BLOCK_KEYS)
        high = tl.minimum((split + 1) * SPLIT, stop)
        # blocks [low, plain_from) and [plain_to, high) have edges, those between have none
        plain_to = tl.maximum(tl.minimum(high, seen_by_all) // BLOCK_KEYS * BLOCK_KEYS, low)
        plain_from = low
        if WINDOWED:
            plain_from = tl.cdiv(tl.maximum(all_from, low), BLOCK_KEYS) * BLOCK_KEYS
            plain_from = tl.minimum(plain_from, tl.maximum(plain_to, low))
        split_largest = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
        weights = tl.zeros((TILE_ROWS, BLOCK_KEYS), tl.float32)
        minima = tl.zeros((TILE_ROWS, BLOCK_KEYS), tl.float32)
        sums = tl.zeros((TILE_ROWS, DIMS), tl.float32)
        odd_sums = tl.zeros((TILE_ROWS, DIMS), tl.float32)
        if WINDOWED:
            split_largest, weights, minima, sums, odd_sums = _attend(
                split_largest, weights, minima, sums, odd_sums, low, plain_from, stop,
                query, odd_query, query_sum, position, table, k_head, v_head, kp_head, vp_head, scale, window,
                True, HEAD_DIM, PAGE_TOKENS, DIMS, BLOCK_KEYS, INT4, WINDOWED, UNPACK, WIDE, 1,
                K_PAGE, K_TOKEN, V_PAGE, V_TOKEN, KP_PAGE, KP_TOKEN, VP_PAGE, VP_TOKEN)  # fmt: skip
        split_largest, weights, minima, sums, odd_sums = _attend(
            split_largest, weights, minima, sums, odd_sums, plain_from, plain_to, stop,
            query, odd_query, query_sum, position, table, k_head, v_head, kp_head, vp_head, scale, window,
            False, HEAD_DIM, PAGE_TOKENS, DIMS, BLOCK_KEYS, INT4, WINDOWED, UNPACK, WIDE, STAGES,
            K_PAGE, K_TOKEN, V_PAGE, V_TOKEN, KP_PAGE, KP_TOKEN, VP_PAGE, VP_TOKEN)  # fmt: skip
        split_largest, weights, minima, sums, odd_sums = _attend(
            split_largest, weights, minima, sums, odd_sums, plain_to, high, stop,
            query, odd_query, query_sum, position, table, k_head, v_head, kp_head, vp_head, scale, window,
            True, HEAD_DIM, PAGE_TOKENS, DIMS, BLOCK_KEYS, INT4, WINDOWED, UNPACK, WIDE, 1,
            K_PAGE, K_TOKEN, V_PAGE, V_TOKEN, KP_PAGE, KP_TOKEN, VP_PAGE, VP_TOKEN)  # fmt: skip
        split_weight = tl.sum(weights, axis=1)
        if INT4:
            minimum = tl.sum(minima, axis=1)
            sums += minimum[:, None]
            odd_sums += minimum[:, None]
        if SHARED:
            place = (token.to(tl.int64) * HEADS + head) * splits + split
            tl.store(partial_stats + place * 2, split_largest, mask=present)
            tl.store(partial_stats + place * 2 + 1, split_weight, mask=present)
            _store_dims(partial_sums + place * HEAD_DIM, sums, odd_sums, dims, inside, INT4)
        else:
            kept, added, largest = _shares(largest, split_largest)
            weight = weight * kept + split_weight * added
            total = total * kept[:, None] + sums * added[:, None]
            if INT4:
                odd_total = odd_total * kept[:, None] + odd_sums * added[:, None]
    if not SHARED:
        place = (token.to(tl.int64) * HEADS + head) * HEAD_DIM
        weight = tl.where(position >= 0, weight, 1.0)
        total = total / weight[:, None]
        odd_total = odd_total / weight[:, None]
        dtype = out.dtype.element_ty
        _store_dims(out + place, total.to(dtype), odd_total.to(dtype), dims, inside, INT4)


@triton.jit
def _row_of(query_starts, block, rows, BLOCK_TOKENS: tl.constexpr):
    """The row of a block of tokens: row r's blocks begin at query_starts[r] // BLOCK_TOKENS + r."""
    low = block * 0
    high = low + rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_starts + middle) // BLOCK_TOKENS + middle <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _shares(largest, other):
    """The factors that bring sums under `largest` and `other` under the larger of the two, and that."""
    together = tl.maximum(largest, other)
    base = tl.where(together == float("-inf"), 0.0, together)
    return tl.exp2(largest - base), tl.exp2(other - base), together


@triton.jit
def _store_dims(places, even, odd, dims, inside, INT4: tl.constexpr):
    """Store each row's dimensions; over INT4 pages they are computed apart, even ones and odd ones."""
    if INT4:
        tl.store(places[:, None] + 2 * dims[None, :], even, mask=inside)
        tl.store(places[:, None] + 2 * dims[None, :] + 1, odd, mask=inside)
    else:
        tl.store(places[:, None] + dims[None, :], even, mask=inside)


@triton.jit
def _attend(
    largest,
    weights,
    minima,
    sums,
    odd_sums,
    first,
    last,
    stop,
    query,
    odd_query,
    query_sum,
    position,
    table,
    k_head,
    v_head,
    kp_head,
    vp_head,
    scale,
    window,
    EDGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    INT4: tl.constexpr,
    WINDOWED: tl.constexpr,
    UNPACK: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    K_PAGE: tl.constexpr,
    K_TOKEN: tl.constexpr,
    V_PAGE: tl.constexpr,
    V_TOKEN: tl.constexpr,
    KP_PAGE: tl.constexpr,
    KP_TOKEN: tl.constexpr,
    VP_PAGE: tl.constexpr,
    VP_TOKEN: tl.constexpr,
):
    """Take the blocks of keys [first, last) into a split's running softmax.

    `weights` [rows, BLOCK_KEYS] are the exponentials' sums lane by lane, joined at the split's end; over INT4 pages
    `minima` are those of exponential × minimum, `sums` and `odd_sums` the even and the odd dimensions.
    """
    WIDTH: tl.constexpr = HEAD_DIM // 2 if INT4 else HEAD_DIM
    dims = tl.arange(0, DIMS)
    lanes = tl.arange(0, BLOCK_KEYS)
    dtype = query.dtype
    for start in tl.range(first, last, BLOCK_KEYS, num_stages=STAGES):
        places = start + lanes
        if EDGE:
            held = places < stop
            page = tl.load(table + places // PAGE_TOKENS, mask=held, other=0).to(tl.int64)
        else:
            held = tl.full((BLOCK_KEYS,), True, tl.int1)
            page = tl.load(table + places // PAGE_TOKENS).to(tl.int64)
        offset = places % PAGE_TOKENS

        at_keys = k_head + (page * K_PAGE + offset * K_TOKEN)[None, :] + dims[:, None]
        at_values = v_head + (page * V_PAGE + offset * V_TOKEN)[:, None] + dims[None, :]
        if EDGE or WIDTH != DIMS:
            keys = tl.load(at_keys, mask=held[None, :] & (dims[:, None] < WIDTH), other=0)
            values = tl.load(at_values, mask=held[:, None] & (dims[None, :] < WIDTH), other=0)
        else:
            keys = tl.load(at_keys)
            values = tl.load(at_values)
        if INT4:
            at_key_params = kp_head + page * KP_PAGE + offset * KP_TOKEN
            at_value_params = vp_head + page * VP_PAGE + offset * VP_TOKEN
            if EDGE:
                key_words = tl.load(at_key_params, mask=held, other=0)
                value_words = tl.load(at_value_params, mask=held, other=0)
            else:
                key_words = tl.load(at_key_params)
                value_words = tl.load(at_value_params)
            key_scale, key_middle = _scale_and_middle(key_words)
            value_scale, value_middle = _scale_and_middle(value_words)
            low, high = _unpacked(keys, dtype, UNPACK)
            scores = tl.zeros((query.shape[0], BLOCK_KEYS), tl.float32)
            scores = _product(query, low, scores, WIDE)
            scores = _product(odd_query, high, scores, WIDE)
            scores = scores * key_scale[None, :] + query_sum[:, None] * key_middle[None, :]
        else:
            scores = _product(query, keys, tl.zeros((query.shape[0], BLOCK_KEYS), tl.float32), WIDE)
        scores = scores * scale
        if EDGE:
            seen = places[None, :] <= position[:, None]
            if WINDOWED:
                seen &= places[None, :] > position[:, None] - window
            scores = tl.where(seen, scores, float("-inf"))

        together = tl.maximum(largest, tl.max(scores, axis=1))
        base = tl.where(together == float("-inf"), 0.0, together)
        kept = tl.exp2(largest - base)[:, None]
        largest = together
        added = tl.exp2(scores - base[:, None])
        weights = weights * kept + added
        sums = sums * kept
        if INT4:
            odd_sums = odd_sums * kept
            scaled = added * value_scale[None, :]
            shifted = added * value_middle[None, :]
            if EDGE:  # 0 times a scale that is not finite
                scaled = tl.where(seen, scaled, 0.0)
                shifted = tl.where(seen, shifted, 0.0)
            minima = minima * kept + shifted
            low, high = _unpacked(values, dtype, UNPACK)
            scaled = scaled.to(dtype)
            sums = _product(scaled, low, sums, WIDE)
            odd_sums = _product(scaled, high, odd_sums, WIDE)
        else:
            if EDGE:
                # 0 times a value that is not finite: such values are taken out, and told to those who see them
                broken = tl.abs(values.to(tl.float32)) < float("inf")
                broken = tl.where(broken, 0.0, 1.0)
                values = tl.where(broken > 0.0, 0.0, values).to(dtype)
                if tl.max(tl.max(broken, axis=1), axis=0) > 0.0:
                    met = tl.zeros(sums.shape, tl.float32)
                    met = _product(seen.to(tl.float32).to(dtype), broken.to(dtype), met, WIDE)
                    sums = tl.where(met > 0.0, float("nan"), sums)
            sums = _product(added.to(dtype), values, sums, WIDE)
    return largest, weights, minima, sums, odd_sums


@triton.jit
def _product(left, right, sums, WIDE: tl.constexpr):
    """left @ right + sums, in float32."""
    if WIDE:  # Triton's interpreter multiplies bfloat16 as if it were an integer
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")


@triton.jit
def _scale_and_middle(words):
    """(scale, minimum + 8 scale) float32 of params [keys], each two float16 in one int32: scale low, minimum high."""
    scale = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    minimum = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, minimum + 8.0 * scale


@triton.jit
def _unpacked(packed, dtype: tl.constexpr, HOW: tl.constexpr):
    """The codes - 8 in the low and in the high nibbles of `packed` uint8, as numbers of the dtype, all exact.

    A code in the low bits of bfloat16's 128, or of float16's 1024, is 128 or 1024 plus the code: bytes are spread
    between the constant's, and 136 or 1032 is subtracted, two codes to an instruction.
    """
    if HOW == 1:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 lows, highs, one, less;
            mov.b32 one, 0x3F803F80;
            mov.b32 less, 0xC308C308;
            and.b32 lows, $4, 0x0F0F0F0F;
            shr.u32 highs, $4, 4;
            and.b32 highs, highs, 0x0F0F0F0F;
            prmt.b32 $0, lows, 0x43434343, 0x4140;
            prmt.b32 $1, lows, 0x43434343, 0x4342;
            prmt.b32 $2, highs, 0x43434343, 0x4140;
            prmt.b32 $3, highs, 0x43434343, 0x4342;
            fma.rn.bf16x2 $0, $0, one, less;
            fma.rn.bf16x2 $1, $1, one, less;
            fma.rn.bf16x2 $2, $2, one, less;
            fma.rn.bf16x2 $3, $3, one, less;
            }""",
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    elif HOW == 2:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 lows, highs, less;
            mov.b32 less, 0x64086408;
            and.b32 lows, $4, 0x0F0F0F0F;
            shr.u32 highs, $4, 4;
            and.b32 highs, highs, 0x0F0F0F0F;
            prmt.b32 $0, lows, 0x64646464, 0x4140;
            prmt.b32 $1, lows, 0x64646464, 0x4342;
            prmt.b32 $2, highs, 0x64646464, 0x4140;
            prmt.b32 $3, highs, 0x64646464, 0x4342;
            sub.rn.f16x2 $0, $0, less;
            sub.rn.f16x2 $1, $1, less;
            sub.rn.f16x2 $2, $2, less;
            sub.rn.f16x2 $3, $3, less;
            }""",
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        low = ((packed & 15).to(tl.int32) - 8).to(tl.float32).to(dtype)
        high = ((packed >> 4).to(tl.int32) - 8).to(tl.float32).to(dtype)
    return low, high


@triton.jit(do_not_specialize=["splits", "window"])
def _fold_kernel(
    out,
    partial_sums,
    partial_stats,
    positions,
    splits,
    position_stride,
    window,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Fold the splits of one token and head in ascending order, as a program of its own would have."""
    token = tl.program_id(0).to(tl.int64)
    line = token * HEADS + tl.program_id(1)
    dims = tl.arange(0, DIMS)
    inside = dims < HEAD_DIM
    position = tl.load(positions + token * position_stride).to(tl.int32)
    last = position // SPLIT
    first = position * 0
    if WINDOWED:
        first = tl.maximum(position - window + 1, 0) // SPLIT
    largest = tl.full((1,), float("-inf"), tl.float32)
    weight = tl.zeros((1,), tl.float32)
    total = tl.zeros((DIMS,), tl.float32)
    if position >= 0:
        for split in range(first, last + 1, 4):  # four at once, so that their loads overlap
            stats = partial_stats + (line * splits + split) * 2
            sums = partial_sums + (line * splits + split) * HEAD_DIM + dims
            m0, w0, s0 = _partial(stats, sums, last - split, inside)
            m1, w1, s1 = _partial(stats + 2, sums + HEAD_DIM, last - split - 1, inside)
            m2, w2, s2 = _partial(stats + 4, sums + 2 * HEAD_DIM, last - split - 2, inside)
            m3, w3, s3 = _partial(stats + 6, sums + 3 * HEAD_DIM, last - split - 3, inside)
            largest, weight, total = _folded(largest, weight, total, m0, w0, s0)
            largest, weight, total = _folded(largest, weight, total, m1, w1, s1)
            largest, weight, total = _folded(largest, weight, total, m2, w2, s2)
            largest, weight, total = _folded(largest, weight, total, m3, w3, s3)
        total = total / weight
    tl.store(out + line * HEAD_DIM + dims, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _partial(stats, sums, left, inside):
    """A split's largest score, weight and sums; those of no keys at all behind the last split (`left` < 0)."""
    one = tl.arange(0, 1)
    there = one <= left
    largest = tl.load(stats + one, mask=there, other=float("-inf"))
    weight = tl.load(stats + 1 + one, mask=there, other=0.0)
    return largest, weight, tl.load(sums, mask=inside & there, other=0.0)


@triton.jit
def _folded(largest, weight, total, other_largest, other_weight, other_total):
    kept, added, largest = _shares(largest, other_largest)
    return largest, weight * kept + other_weight * added, total * kept + other_total * added
