"""The kernels behind `exeunt.kernels.write_kv.triton`: writing, turning, rotating, rounding to codes."""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803

import triton
import triton.language as tl

_FP16_MAX = tl.constexpr(65504.0)
# Adding and subtracting 1.5 × 2^23 rounds a float32 in 0..15 to the nearest integer, ties to even.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def write_kernel(
    keys,
    values,
    slots,
    page_keys,
    page_values,
    key_params,
    value_params,
    keys_token_stride,
    keys_head_stride,
    values_token_stride,
    values_head_stride,
    slot_stride,
    rotation_factor,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    INT4: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
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
    TOGETHER: tl.constexpr,
    DIMS: tl.constexpr,
    ROTATION_STEPS: tl.constexpr,
):
    """A program writes TOGETHER heads (axis 1) of a token (axis 0), keys or values by axis 2, nothing at slot -1."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    slot = tl.load(slots + token * slot_stride).to(tl.int64)
    if slot < 0:
        return
    dims = tl.arange(0, DIMS)
    inside = (heads[:, None] < KV_HEADS) & (dims[None, :] < HEAD_DIM)
    if tl.program_id(2) == 0:
        places = token * keys_token_stride + heads[:, None] * keys_head_stride + dims[None, :]
        key = tl.load(keys + places, mask=inside, other=0.0)
        if INT4:
            key = _rotated(key.to(tl.float32), rotation_factor, TOGETHER, DIMS, ROTATION_STEPS)
        _store_heads(key, slot, heads, page_keys, key_params,
                     K_PAGE, K_HEAD, K_TOKEN, KP_PAGE, KP_HEAD, KP_TOKEN,
                     KV_HEADS, HEAD_DIM, INT4, PAGE_TOKENS, TOGETHER, DIMS)  # fmt: skip
    else:
        places = token * values_token_stride + heads[:, None] * values_head_stride + dims[None, :]
        value = tl.load(values + places, mask=inside, other=0.0)
        _store_heads(value, slot, heads, page_values, value_params,
                     V_PAGE, V_HEAD, V_TOKEN, VP_PAGE, VP_HEAD, VP_TOKEN,
                     KV_HEADS, HEAD_DIM, INT4, PAGE_TOKENS, TOGETHER, DIMS)  # fmt: skip


@triton.jit
def turn_kernel(
    qkv,
    table,
    positions,
    slots,
    norm,
    queries,
    page_keys,
    page_values,
    key_params,
    value_params,
    token_stride,
    head_stride,
    position_stride,
    slot_stride,
    eps,
    rotation_factor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERY_PARTS: tl.constexpr,
    KV_PARTS: tl.constexpr,
    TURNS: tl.constexpr,
    NORMS: tl.constexpr,
    INT4: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
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
    TOGETHER: tl.constexpr,
    DIMS: tl.constexpr,
    ROTATION_STEPS: tl.constexpr,
):
    """A program takes TOGETHER heads of a token (axis 0) through norm, RoPE and rotation.

    Axis 1 are the queries' heads, which go to `queries` [tokens, HEADS, HEAD_DIM], then keys and values, which are
    written to the token's slot, none where that is -1.
    """
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = qkv + token * token_stride
    dims = tl.arange(0, DIMS)
    # A padding token has position -1 and no slot; what is computed for it is read by nobody.
    position = tl.maximum(tl.load(positions + token * position_stride).to(tl.int64), 0)
    slot = tl.load(slots + token * slot_stride).to(tl.int64)
    if part < QUERY_PARTS:
        heads = part * TOGETHER + tl.arange(0, TOGETHER)
        inside = (heads[:, None] < HEADS) & (dims[None, :] < HEAD_DIM)
        query = _turned(
            row, heads, inside, table, position, norm, head_stride, eps, HEAD_DIM, DIMS, TURNS, NORMS
        )
        if INT4:
            wide = _rotated(query.to(tl.float32), rotation_factor, TOGETHER, DIMS, ROTATION_STEPS)
            query = wide.to(query.dtype)
        places = (token * HEADS + heads[:, None]) * HEAD_DIM + dims[None, :]
        tl.store(queries + places, query, mask=inside)
    elif slot >= 0:
        if part < QUERY_PARTS + KV_PARTS:
            heads = (part - QUERY_PARTS) * TOGETHER + tl.arange(0, TOGETHER)
            inside = (heads[:, None] < KV_HEADS) & (dims[None, :] < HEAD_DIM)
            key = _turned(
                row,
                HEADS + heads,
                inside,
                table,
                position,
                norm,
                head_stride,
                eps,
                HEAD_DIM,
                DIMS,
                TURNS,
                NORMS,
            )
            if INT4:
                key = _rotated(key.to(tl.float32), rotation_factor, TOGETHER, DIMS, ROTATION_STEPS)
            _store_heads(key, slot, heads, page_keys, key_params,
                         K_PAGE, K_HEAD, K_TOKEN, KP_PAGE, KP_HEAD, KP_TOKEN,
                         KV_HEADS, HEAD_DIM, INT4, PAGE_TOKENS, TOGETHER, DIMS)  # fmt: skip
        else:
            heads = (part - QUERY_PARTS - KV_PARTS) * TOGETHER + tl.arange(0, TOGETHER)
            inside = (heads[:, None] < KV_HEADS) & (dims[None, :] < HEAD_DIM)
            places = (HEADS + KV_HEADS + heads[:, None]) * head_stride + dims[None, :]
            value = tl.load(row + places, mask=inside, other=0.0)
            _store_heads(value, slot, heads, page_values, value_params,
                         V_PAGE, V_HEAD, V_TOKEN, VP_PAGE, VP_HEAD, VP_TOKEN,
                         KV_HEADS, HEAD_DIM, INT4, PAGE_TOKENS, TOGETHER, DIMS)  # fmt: skip


@triton.jit
def rotate_kernel(
    x,
    out,
    token_stride,
    head_stride,
    rotation_factor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOGETHER: tl.constexpr,
    DIMS: tl.constexpr,
    ROTATION_STEPS: tl.constexpr,
):
    """A program rotates TOGETHER heads (axis 1) of a token (axis 0) into `out` [tokens, HEADS, HEAD_DIM]."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    dims = tl.arange(0, DIMS)
    inside = (heads[:, None] < HEADS) & (dims[None, :] < HEAD_DIM)
    places = token * token_stride + heads[:, None] * head_stride + dims[None, :]
    narrow = tl.load(x + places, mask=inside, other=0.0)
    wide = _rotated(narrow.to(tl.float32), rotation_factor, TOGETHER, DIMS, ROTATION_STEPS)
    places = (token * HEADS + heads[:, None]) * HEAD_DIM + dims[None, :]
    tl.store(out + places, wide.to(narrow.dtype), mask=inside)


@triton.jit
def _turned(
    row,
    heads,
    inside,
    table,
    position,
    norm,
    head_stride,
    eps,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    TURNS: tl.constexpr,
    NORMS: tl.constexpr,
):
    """Some heads of a token [TOGETHER, DIMS] in the model's dtype: normed, then turned by their position.

    Rounded where PyTorch's separate operations round. Products and sums of 16-bit values are computed in float32
    and rounded, as PyTorch does.
    """
    dims = tl.arange(0, DIMS)
    places = heads[:, None] * head_stride + dims[None, :]
    x = tl.load(row + places, mask=inside, other=0.0)
    dtype = x.dtype
    if NORMS:
        wide = x.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / HEAD_DIM + eps)
        weight = tl.load(norm + heads[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=0.0)
        x = _normed(x, inverse, weight)
    if TURNS:
        # The other half of the head stands at the rolled places: read once more, as no lane holds both.
        rolled = (dims + HEAD_DIM // 2) % HEAD_DIM
        y = tl.load(row + heads[:, None] * head_stride + rolled[None, :], mask=inside, other=0.0)
        if NORMS:
            weight = tl.load(norm + heads[:, None] * HEAD_DIM + rolled[None, :], mask=inside, other=0.0)
            y = _normed(y, inverse, weight)
        turn = table + position * (2 * HEAD_DIM) + dims
        cosines = tl.load(turn, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
        sines = tl.load(turn + HEAD_DIM, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
        straight = (x.to(tl.float32) * cosines[None, :]).to(dtype).to(tl.float32)
        crossed = (y.to(tl.float32) * sines[None, :]).to(dtype).to(tl.float32)
        x = (straight + crossed).to(dtype)
    return x


@triton.jit
def _normed(x, inverse, weight):
    """x [heads, dims] times its inverse root mean square, rounded, times the weight, rounded."""
    normalised = (x.to(tl.float32) * inverse[:, None]).to(x.dtype)
    return (normalised.to(tl.float32) * weight.to(tl.float32)).to(x.dtype)


@triton.jit
def _rotated(x, factor, TOGETHER: tl.constexpr, DIMS: tl.constexpr, STEPS: tl.constexpr):
    """x [TOGETHER, DIMS] float32 times the Hadamard matrix: butterflies of strides 1, 2, 4, …, then the factor."""
    for step in tl.static_range(STEPS):
        pairs = tl.reshape(x, (TOGETHER, DIMS >> (step + 1), 2, 1 << step))
        is_low = (tl.arange(0, 2) == 0)[None, None, :, None]
        sums = tl.sum(pairs, axis=2, keep_dims=True)
        differences = tl.sum(tl.where(is_low, pairs, -pairs), axis=2, keep_dims=True)
        x = tl.reshape(tl.where(is_low, sums, differences), (TOGETHER, DIMS))
    return x * factor


@triton.jit
def _store_heads(
    x,
    slot,
    heads,
    pages,
    scaling,
    PAGE: tl.constexpr,
    HEAD: tl.constexpr,
    TOKEN: tl.constexpr,
    PARAMS_PAGE: tl.constexpr,
    PARAMS_HEAD: tl.constexpr,
    PARAMS_TOKEN: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    INT4: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    TOGETHER: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Write x [TOGETHER, DIMS] to a slot's page: as it is, or as codes and scaling over INT4 pages."""
    page = slot // PAGE_TOKENS
    offset = slot % PAGE_TOKENS
    held = heads < KV_HEADS
    dims = tl.arange(0, DIMS)
    if INT4:
        codes, scale, minimum = _quantised(x.to(tl.float32), dims[None, :] < HEAD_DIM)
        halves = tl.arange(0, 2)[None, None, :]
        nibbles = tl.reshape(codes, (TOGETHER, DIMS // 2, 2)) << (4 * halves)
        packed = tl.sum(nibbles, axis=2).to(tl.uint8)
        places = tl.arange(0, DIMS // 2)
        into = pages + page * PAGE + offset * TOKEN + heads[:, None] * HEAD + places[None, :]
        tl.store(into, packed, mask=held[:, None] & (places[None, :] < HEAD_DIM // 2))
        into_params = scaling + page * PARAMS_PAGE + offset * PARAMS_TOKEN + heads * PARAMS_HEAD
        tl.store(into_params, scale, mask=held)
        tl.store(into_params + 1, minimum, mask=held)
    else:
        into = pages + page * PAGE + offset * TOKEN + heads[:, None] * HEAD + dims[None, :]
        inside = held[:, None] & (dims[None, :] < HEAD_DIM)
        tl.store(into, x.to(pages.dtype.element_ty), mask=inside)


@triton.jit
def _quantised(x, inside):
    """(codes int32, scale float16, minimum float16) of each head of x float32; as `quantize_heads` rounds them."""
    broken = tl.max((x != x).to(tl.int32), axis=1) > 0
    low = tl.min(tl.where(inside, x, float("inf")), axis=1)
    high = tl.max(tl.where(inside, x, float("-inf")), axis=1)
    low = tl.where(low < -_FP16_MAX, -_FP16_MAX, low)
    high = tl.where(high > _FP16_MAX, _FP16_MAX, high)
    # Minima skip NaN: a head that holds one must stay visible as such.
    low = tl.where(broken, float("nan"), low)
    exact = tl.div_rn(high - low, tl.full(high.shape, 15.0, tl.float32))
    scale = tl.where(exact > _FP16_MAX, _FP16_MAX, exact).to(tl.float16)
    minimum = low.to(tl.float16)
    step = scale.to(tl.float32)
    one = tl.full(step.shape, 1.0, tl.float32)
    inverse = tl.where(step > 0, tl.div_rn(one, tl.where(step > 0, step, one)), 0.0)
    codes = (x - minimum.to(tl.float32)[:, None]) * inverse[:, None]
    codes = tl.minimum(tl.maximum(codes, 0.0), 15.0)
    return ((codes + _ROUNDER) - _ROUNDER).to(tl.int32), scale, minimum
