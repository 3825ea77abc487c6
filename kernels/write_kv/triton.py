"""Triton kernels that write keys and values into pages, with or without turning queries and keys first.

A program takes one token and a few of its heads, so that no result depends on what else is in the call. The
arithmetic is that of the plain PyTorch version, operation by operation: fused multiply-adds are off
(`enable_fp_fusion`), divisions are correctly rounded and the rotation adds in the same order, so that INT4 pages hold
the same bits.
"""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803

import math
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from exeunt.kernels.paged_batch import KVBlock
from exeunt.kernels.write_kv.hadamard import hadamard_block

NUM_WARPS: Final = 4
_HEADS_PER_PROGRAM: Final = 4
_FP16_MAX = tl.constexpr(65504.0)
# Adding and subtracting 1.5 × 2^23 rounds a float32 in 0..15 to the nearest integer, ties to even.
_ROUNDER = tl.constexpr(12582912.0)


def write_kv_triton(keys: Tensor, values: Tensor, slots: Tensor, block: KVBlock) -> None:
    """Write keys and values [tokens, kv_heads, head_dim] to `slots` [tokens]; see `exeunt.kernels.write_kv`.

    A token whose slot is -1 is not written.
    """
    _write_kv(
        _dense_dims(keys),
        _dense_dims(values),
        slots,
        block.keys,
        block.values,
        block.key_params,
        block.value_params,
    )


def turn_and_write_kv_triton(
    qkv: Tensor,
    table: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    block: KVBlock,
    heads: int,
    head_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Write the keys and values in `qkv` and return its queries [tokens, heads, head_dim]; see `turn_and_write_kv`."""
    queries: Tensor = _turn_and_write_kv(
        _dense_dims(qkv),
        table,
        positions,
        slots,
        block.keys,
        block.values,
        block.key_params,
        block.value_params,
        heads,
        head_norm,
        eps,
    )
    return queries


def rotate_heads_triton(x: Tensor) -> Tensor:
    """Return x [tokens, heads, head_dim] times the Hadamard matrix of `rotate`, rounded to x's dtype once."""
    rotated: Tensor = _rotate_heads(_dense_dims(x))
    return rotated


@torch.library.custom_op(
    "exeunt::write_kv", mutates_args=("page_keys", "page_values", "key_params", "value_params")
)
def _write_kv(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    page_keys: Tensor,
    page_values: Tensor,
    key_params: Tensor | None,
    value_params: Tensor | None,
) -> None:
    tokens, kv_heads, head_dim = keys.shape
    if tokens == 0:
        return
    together = _heads_together(kv_heads)
    _write_kernel[(tokens, triton.cdiv(kv_heads, together), 2)](
        keys,
        values,
        slots,
        page_keys,
        page_values,
        key_params,
        value_params,
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        slots.stride(0),
        _rotation_factor(head_dim),
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        **_page_constants(page_keys, page_values, key_params, value_params),
        **_tile_constants(head_dim, together),
        num_warps=NUM_WARPS,
        num_stages=1,
        enable_fp_fusion=False,
    )


@_write_kv.register_fake
def _(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    page_keys: Tensor,
    page_values: Tensor,
    key_params: Tensor | None,
    value_params: Tensor | None,
) -> None:
    return None


@torch.library.custom_op(
    "exeunt::turn_and_write_kv", mutates_args=("page_keys", "page_values", "key_params", "value_params")
)
def _turn_and_write_kv(
    qkv: Tensor,
    table: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    page_keys: Tensor,
    page_values: Tensor,
    key_params: Tensor | None,
    value_params: Tensor | None,
    heads: int,
    head_norm: Tensor | None,
    eps: float,
) -> Tensor:
    tokens, all_heads, head_dim = qkv.shape
    queries = torch.empty((tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return queries
    kv_heads = (all_heads - heads) // 2
    together = _heads_together(kv_heads)
    query_parts, kv_parts = triton.cdiv(heads, together), triton.cdiv(kv_heads, together)
    _turn_kernel[(tokens, query_parts + 2 * kv_parts)](
        qkv,
        table,
        positions,
        slots,
        head_norm,
        queries,
        page_keys,
        page_values,
        key_params,
        value_params,
        qkv.stride(0),
        qkv.stride(1),
        positions.stride(0),
        slots.stride(0),
        eps,
        _rotation_factor(head_dim),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        QUERY_PARTS=query_parts,
        KV_PARTS=kv_parts,
        TURNS=table is not None,
        NORMS=head_norm is not None,
        **_page_constants(page_keys, page_values, key_params, value_params),
        **_tile_constants(head_dim, together),
        num_warps=NUM_WARPS,
        num_stages=1,
        enable_fp_fusion=False,
    )
    return queries


@_turn_and_write_kv.register_fake
def _(
    qkv: Tensor,
    table: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    page_keys: Tensor,
    page_values: Tensor,
    key_params: Tensor | None,
    value_params: Tensor | None,
    heads: int,
    head_norm: Tensor | None,
    eps: float,
) -> Tensor:
    return torch.empty((qkv.shape[0], heads, qkv.shape[2]), dtype=qkv.dtype, device=qkv.device)


@torch.library.custom_op("exeunt::rotate_heads", mutates_args=())
def _rotate_heads(x: Tensor) -> Tensor:
    tokens, heads, head_dim = x.shape
    out = torch.empty((tokens, heads, head_dim), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    together = _heads_together(heads)
    _rotate_kernel[(tokens, triton.cdiv(heads, together))](
        x,
        out,
        x.stride(0),
        x.stride(1),
        _rotation_factor(head_dim),
        HEADS=heads,
        HEAD_DIM=head_dim,
        **_tile_constants(head_dim, together),
        num_warps=NUM_WARPS,
        num_stages=1,
        enable_fp_fusion=False,
    )
    return out


@_rotate_heads.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _dense_dims(x: Tensor) -> Tensor:
    """Return x, copied unless the elements of a head lie together."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads_together(heads: int) -> int:
    """Heads that one program takes: by the model's shape only."""
    together: int = triton.next_power_of_2(max(1, heads))
    return min(_HEADS_PER_PROGRAM, together)


def _rotation_factor(head_dim: int) -> float:
    return 1.0 / math.sqrt(hadamard_block(head_dim))


def _tile_constants(head_dim: int, together: int) -> dict[str, int]:
    return {
        "TOGETHER": together,
        "DIMS": max(2, triton.next_power_of_2(head_dim)),
        "ROTATION_STEPS": hadamard_block(head_dim).bit_length() - 1,
    }


def _page_constants(
    page_keys: Tensor, page_values: Tensor, key_params: Tensor | None, value_params: Tensor | None
) -> dict[str, int | bool]:
    """Strides of the pages: they are a layout's own, so that kernels may know them as constants."""
    constants: dict[str, int | bool] = {"INT4": key_params is not None, "PAGE_TOKENS": page_keys.shape[2]}
    pages = {"K": page_keys, "V": page_values, "KP": key_params, "VP": value_params}
    for name, tensor in pages.items():
        for index, part in enumerate(("PAGE", "HEAD", "TOKEN")):
            constants[f"{name}_{part}"] = 0 if tensor is None else tensor.stride(index)
    return constants


@triton.jit
def _write_kernel(
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
def _turn_kernel(
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
def _rotate_kernel(
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
