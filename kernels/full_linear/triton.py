"""The full-precision linear layer on a GPU: the row-invariant stand-in for the library's matrix product.

One kernel for decode and prefill (see `exeunt.kernels.linear_parts` for the cut of the sum and the tiles).
"""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from exeunt.kernels.linear_parts import (
    TILES,
    added_product,
    checked_out,
    checked_rows,
    join,
    launch_for,
    scratch_for,
    tile_columns,
)
from exeunt.kernels.rows.norm import RowNorm

_STEP_BYTES: Final = 128  # of an output's inputs that are summed at once


@triton.jit
def _sum_part(
    x,
    weight,
    first,
    last,
    rows,
    outputs,
    live,
    there,
    x_stride,
    weight_stride,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The products [BLOCK outputs, ROWS] over inputs `first` to `last` - 1."""
    sums = tl.zeros((BLOCK, ROWS), tl.float32)
    row = x + rows.to(tl.int64)[:, None] * x_stride
    run = weight + outputs.to(tl.int64)[:, None] * weight_stride
    for start in tl.range(first, last, STEP, num_stages=STAGES):
        at = start + tl.arange(0, STEP)
        inside = (at < last)[None, :]
        values = tl.load(row + at[None, :], mask=live[:, None] & inside, other=0.0)
        weights = tl.load(run + at[None, :], mask=there[:, None] & inside, other=0.0)
        sums = added_product(weights, values.T, sums)
    return sums


@triton.jit(do_not_specialize=["tokens", "parts"])
def _full_linear(
    out,
    x,
    weight,
    bias,
    scratch,
    counters,
    tokens,
    in_features,
    width,
    parts,
    part_inputs,
    out_stride,
    x_stride,
    weight_stride,
    STEP: tl.constexpr,
    BIASED: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outputs, there = tile_columns(width, tl.program_id(1), GATED, BLOCK)
    live = rows < tokens
    if SPLIT:
        part = tl.program_id(2)
        total = _sum_part(
            x,
            weight,
            part * part_inputs,
            tl.minimum((part + 1) * part_inputs, in_features),
            rows,
            outputs,
            live,
            there,
            x_stride,
            weight_stride,
            STEP,
            ROWS,
            BLOCK,
            STAGES,
        )
    else:
        total = tl.zeros((BLOCK, ROWS), tl.float32)
        for part in range(parts):
            total += _sum_part(
                x,
                weight,
                part * part_inputs,
                tl.minimum((part + 1) * part_inputs, in_features),
                rows,
                outputs,
                live,
                there,
                x_stride,
                weight_stride,
                STEP,
                ROWS,
                BLOCK,
                STAGES,
            )
    join(
        out,
        bias,
        scratch,
        counters,
        total,
        rows,
        tokens,
        width,
        parts,
        out_stride,
        BIASED,
        GATED,
        ACTIVATION,
        ADDED,
        SPLIT,
        ROWS,
        BLOCK,
    )


def full_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: RowNorm | None = None,
    activation: str | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Return x [..., in] times weight [out, in] transposed, plus bias [out]: [tokens, out] in x's dtype.

    x and weight are of one dtype. `norm` is applied to x's rows first. `activation` (one of `ACTIVATIONS`) is applied
    to the result; where the layer is `gated` its outputs are [gate | up], and the result is activation(gate) × up,
    [tokens, out / 2]. With `residual` [tokens, out] the result is added to it in place, and it is returned. Values are
    rounded to the dtype wherever separate operations would. Raises ValueError or TypeError where shapes or dtypes do
    not fit.
    """
    if weight.dtype != x.dtype:
        raise TypeError(f"the input is {x.dtype}, the weight {weight.dtype}")
    out_features, in_features = weight.shape
    rows = checked_rows(x, in_features, norm)
    out = checked_out(rows, rows.shape[0], out_features, bias, activation, gated, residual)
    _full_linear_op(
        rows,
        weight if weight.stride(1) == 1 else weight.contiguous(),
        bias,
        out,
        activation,
        gated,
        residual is not None,
    )
    return out


@torch.library.custom_op("exeunt::full_linear", mutates_args=("out",))
def _full_linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    activation: str | None,
    gated: bool,
    added: bool,
) -> None:
    tokens, in_features = x.shape
    columns = out.shape[1]
    if tokens == 0 or columns == 0:
        return
    launch = launch_for(tokens, in_features, columns, gated, x.dtype)
    sums, counters = scratch_for(launch, tokens, weight.shape[0], x.device)
    step = _STEP_BYTES // x.element_size()
    _full_linear[launch.grid](
        out,
        x,
        weight,
        out if bias is None else bias.contiguous(),
        sums,
        counters,
        tokens,
        in_features,
        columns,
        launch.parts,
        triton.cdiv(in_features, step * launch.parts) * step,
        out.stride(0),
        x.stride(0),
        weight.stride(0),
        STEP=step,
        BIASED=bias is not None,
        GATED=gated,
        ACTIVATION=activation,
        ADDED=added,
        SPLIT=launch.split,
        ROWS=launch.rows,
        BLOCK=TILES.outputs,
        STAGES=TILES.stages,
        num_warps=TILES.warps,
        num_stages=TILES.stages,
        enable_fp_fusion=False,  # multiply-adds are where the source has them, in every variant of the kernel
    )


@_full_linear_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    activation: str | None,
    gated: bool,
    added: bool,
) -> None:
    return None
