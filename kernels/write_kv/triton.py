"""Triton kernels that write keys and values into pages, with or without turning queries and keys first.

A program takes one token and a few of its heads, so that no result depends on what else is in the call. The
arithmetic is that of the plain PyTorch version, operation by operation: fused multiply-adds are off
(`enable_fp_fusion`), divisions are correctly rounded and the rotation adds in the same order, so that INT4 pages hold
the same bits.
"""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import math
from typing import Final

import torch
import triton
from torch import Tensor

from exeunt.kernels.paged_batch import KVBlock
from exeunt.kernels.write_kv.hadamard import hadamard_block
from exeunt.kernels.write_kv.kernels_triton import rotate_kernel, turn_kernel, write_kernel

NUM_WARPS: Final = 4
_HEADS_PER_PROGRAM: Final = 4


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
    write_kernel[(tokens, triton.cdiv(kv_heads, together), 2)](
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
    turn_kernel[(tokens, query_parts + 2 * kv_parts)](
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
    rotate_kernel[(tokens, triton.cdiv(heads, together))](
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
