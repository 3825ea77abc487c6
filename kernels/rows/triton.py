"""RMS and layer norm of rows on a GPU: one program a row, so that a row never knows what else is in the call.

A row is read in blocks whose size depends on its length alone. Sums are kept per lane in float32 and joined once, by
the tree of Triton's reduction. How that tree looks depends on how wide the loads are, and Triton would choose that by
the alignment of the addresses and strides of each call: here the length of the rows says it, and a tensor that is not
aligned as its length promises is copied.
"""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# ruff: noqa: N803

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_LANES: Final = 4096
"""Values of a row that are read at once; longer rows are read in several blocks."""

_VECTOR_BYTES: Final = 16
_FEWEST_LANES: Final = 32  # compilers fail at blocks of one value


@triton.jit(do_not_specialize=["token_stride", "head_stride"], do_not_specialize_on_alignment=["x"])
def _rms_norm(
    out,
    x,
    weight,
    size,
    heads,
    token_stride,
    head_stride,
    weight_stride,
    eps,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token, head = row // heads, row % heads
    x += token * token_stride + head * head_stride
    if ALIGNED:
        x = tl.multiple_of(x, 16)
    weight += head * weight_stride
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + lanes
        value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
        squares += value * value
    scale = tl.rsqrt(tl.sum(squares, axis=0) / size + eps)
    for start in range(0, size, BLOCK):
        at = start + lanes
        inside = at < size
        value = tl.load(x + at, mask=inside, other=0.0)
        # rounded to the dtype before the weight multiplies it, and again behind
        normed = (value.to(tl.float32) * scale).to(value.dtype).to(tl.float32)
        factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * size + at, (normed * factor).to(value.dtype), mask=inside)


@triton.jit(do_not_specialize=["row_stride"], do_not_specialize_on_alignment=["x"])
def _layer_norm(
    out,
    x,
    weight,
    bias,
    size,
    row_stride,
    eps,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    if ALIGNED:
        x = tl.multiple_of(x, 16)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + lanes
        total += tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / size
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + lanes
        inside = at < size
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        distance = tl.where(inside, value - mean, 0.0)
        squares += distance * distance
    scale = tl.rsqrt(tl.sum(squares, axis=0) / size + eps)
    for start in range(0, size, BLOCK):
        at = start + lanes
        inside = at < size
        value = tl.load(x + at, mask=inside, other=0.0)
        normed = (value.to(tl.float32) - mean) * scale
        if WEIGHTED:
            normed = normed * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        if BIASED:
            normed = normed + tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * size + at, normed.to(value.dtype), mask=inside)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return what `rms_norm_reference` returns: x [..., n] normalised, rounded, times the weight; dense.

    The weight is [n], or [heads, n] for an x [..., heads, n] in which each head has its own. Both are of one dtype.
    Raises ValueError where the shapes do not fit.
    """
    if weight.dim() not in (1, 2) or x.shape[-weight.dim() :] != weight.shape:
        raise ValueError(f"the norm's weight is {list(weight.shape)}, the rows are {list(x.shape)}")
    out: Tensor = _rms_norm_op(x, weight, eps)
    return out


def layer_norm_triton(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return the layer norm of x [..., n], times weight [n] plus bias [n] where there are, rounded once; dense.

    Raises ValueError where the shapes do not fit.
    """
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None and part.shape != x.shape[-1:]:
            raise ValueError(f"the norm's {name} is {list(part.shape)}, the rows are {list(x.shape)}")
    out: Tensor = _layer_norm_op(x, weight, bias, eps)
    return out


@torch.library.custom_op("exeunt::rms_norm", mutates_args=())
def _rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    size = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    heads = weight.shape[0] if weight.dim() == 2 else 1
    rows = _rows_of(x, heads, size)
    dense = weight if weight.stride(-1) == 1 else weight.contiguous()
    block = _lanes(size)
    _rms_norm[(rows.shape[0] * heads,)](
        out,
        rows,
        dense,
        size,
        heads,
        rows.stride(0),
        rows.stride(1),
        dense.stride(0) if heads > 1 else 0,
        eps,
        ALIGNED=_aligned(size),
        BLOCK=block,
        num_warps=_warps(block),
        num_stages=1,
    )
    return out


@_rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("exeunt::layer_norm", mutates_args=())
def _layer_norm_op(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    size = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = _rows_of(x, 1, size)
    block = _lanes(size)
    _layer_norm[(rows.shape[0],)](
        out,
        rows,
        x if weight is None else weight.contiguous(),
        x if bias is None else bias.contiguous(),
        size,
        rows.stride(0),
        eps,
        WEIGHTED=weight is not None,
        BIASED=bias is not None,
        ALIGNED=_aligned(size),
        BLOCK=block,
        num_warps=_warps(block),
        num_stages=1,
    )
    return out


@_layer_norm_op.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _rows_of(x: Tensor, heads: int, size: int) -> Tensor:
    """View x [..., heads × size or heads, size] as [tokens, heads, size], copied where it is not dense or aligned."""
    rows = x.reshape(-1, heads, size)
    if rows.stride(2) != 1 and size > 1:
        return rows.contiguous()
    places = (rows.data_ptr(), *(rows.element_size() * rows.stride(dim) for dim in (0, 1)))
    return rows.clone() if _aligned(size) and any(place % _VECTOR_BYTES for place in places) else rows


def _aligned(size: int) -> bool:
    """Whether rows of this many values are read in whole vectors."""
    return size % _VECTOR_BYTES == 0


def _lanes(size: int) -> int:
    lanes: int = triton.next_power_of_2(max(size, _FEWEST_LANES))
    return min(lanes, MOST_LANES)


def _warps(block: int) -> int:
    return 4 if block <= 1024 else 8
