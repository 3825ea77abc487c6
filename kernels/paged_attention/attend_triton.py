"""The attention kernel itself: queries of a row against its pages, a block of keys at a time."""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803, N806

import triton
import triton.language as tl

from exeunt.kernels.arithmetic_triton import added_product
from exeunt.kernels.codes_triton import bias_of, numbers
from exeunt.kernels.paged_attention.fold_triton import shares
from exeunt.kernels.paged_attention.unpack_triton import narrowed, scale_and_minimum


@triton.jit(do_not_specialize=["tokens", "rows", "splits", "window", "table_stride"])
def attention_kernel(
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
    """A program is up to BLOCK_TOKENS neighbouring tokens of a row (axis 0) with the GROUP query heads of a KV head.

    KV heads are axis 1; where SHARED, programs of axis 2 share a row's splits of SPLIT keys.

    Writes `out` [tokens, heads, HEAD_DIM], or where SHARED each split's sums [tokens, heads, splits, HEAD_DIM] and its
    largest score and sum of exponentials [tokens, heads, splits, 2], float32, for the fold.
    """
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
                True, HEAD_DIM, PAGE_TOKENS, DIMS, BLOCK_KEYS, INT4, WINDOWED, 1,
                K_PAGE, K_TOKEN, V_PAGE, V_TOKEN, KP_PAGE, KP_TOKEN, VP_PAGE, VP_TOKEN)  # fmt: skip
        split_largest, weights, minima, sums, odd_sums = _attend(
            split_largest, weights, minima, sums, odd_sums, plain_from, plain_to, stop,
            query, odd_query, query_sum, position, table, k_head, v_head, kp_head, vp_head, scale, window,
            False, HEAD_DIM, PAGE_TOKENS, DIMS, BLOCK_KEYS, INT4, WINDOWED, STAGES,
            K_PAGE, K_TOKEN, V_PAGE, V_TOKEN, KP_PAGE, KP_TOKEN, VP_PAGE, VP_TOKEN)  # fmt: skip
        split_largest, weights, minima, sums, odd_sums = _attend(
            split_largest, weights, minima, sums, odd_sums, plain_to, high, stop,
            query, odd_query, query_sum, position, table, k_head, v_head, kp_head, vp_head, scale, window,
            True, HEAD_DIM, PAGE_TOKENS, DIMS, BLOCK_KEYS, INT4, WINDOWED, 1,
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
            kept, added, largest = shares(largest, split_largest)
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
    dtype: tl.constexpr = query.dtype
    BIAS: tl.constexpr = bias_of(dtype)
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
            key_scale, key_minimum = scale_and_minimum(key_words)
            value_scale, value_minimum = scale_and_minimum(value_words)
            low, high = numbers(keys, dtype)
            scores = tl.zeros((query.shape[0], BLOCK_KEYS), tl.float32)
            scores = added_product(query, low, scores)
            scores = added_product(odd_query, high, scores)
            # one multiplication a key, not one a score
            key_scale = key_scale * scale
            key_base = tl.fma(key_scale, -BIAS, key_minimum * scale)
            scores = tl.fma(scores, key_scale[None, :], query_sum[:, None] * key_base[None, :])
        else:
            scores = added_product(query, keys, tl.zeros((query.shape[0], BLOCK_KEYS), tl.float32))
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
        weights = tl.fma(weights, kept, added)
        sums = sums * kept
        if INT4:
            odd_sums = odd_sums * kept
            scaled = added * value_scale[None, :]
            shifted = added * value_minimum[None, :]
            if EDGE:  # 0 times a scale that is not finite
                scaled = tl.where(seen, scaled, 0.0)
                shifted = tl.where(seen, shifted, 0.0)
            scaled, as_rounded = narrowed(scaled, dtype)
            # what the tensor cores will have multiplied by the bias is taken out again: the rounded weights
            shifted = tl.fma(as_rounded, -BIAS, shifted)
            minima = tl.fma(minima, kept, shifted)
            low, high = numbers(values, dtype)
            sums = added_product(scaled, low, sums)
            odd_sums = added_product(scaled, high, odd_sums)
        else:
            if EDGE:
                # 0 times a value that is not finite: such values are taken out, and told to those who see them
                broken = tl.abs(values.to(tl.float32)) < float("inf")
                broken = tl.where(broken, 0.0, 1.0)
                values = tl.where(broken > 0.0, 0.0, values).to(dtype)
                if tl.max(tl.max(broken, axis=1), axis=0) > 0.0:
                    met = tl.zeros(sums.shape, tl.float32)
                    met = added_product(seen.to(tl.float32).to(dtype), broken.to(dtype), met)
                    sums = tl.where(met > 0.0, float("nan"), sums)
            sums = added_product(added.to(dtype), values, sums)
    return largest, weights, minima, sums, odd_sums
