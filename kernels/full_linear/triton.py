"""The full-precision linear layer on a GPU: the row-invariant stand-in for the library's matrix product.

One kernel for decode and prefill (see `exeunt.kernels.linear_parts` for the cut of the sum and the tiles).
"""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803, SIM102 - a condition known at compile time stands alone

from functools import partial
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from exeunt.kernels.arithmetic_triton import added_product
from exeunt.kernels.linear_parts import (
    Launch,
    all_masked,
    checked_out,
    checked_positions,
    checked_rows,
    join,
    launch_for,
    launch_that_fits,
    scratch_for,
    tile_columns,
)
from exeunt.kernels.rows.norm import RowNorm

_STEP_BYTES: Final = 128  # of an output's inputs that are summed at once


@triton.jit
def _sum_inputs(
    x,
    weight,
    first,
    last,
    part_inputs,
    rows,
    outputs,
    x_stride,
    weight_stride,
    STEP: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The products [BLOCK outputs, ROWS] over inputs `first` to `last` - 1, a WHOLE number of steps or not.

    Each part is summed for itself and they are added in order, in one loop: what is loaded ahead is so across parts.
    """
    total = tl.zeros((BLOCK, ROWS), tl.float32)
    sums = total
    row = x + rows.to(tl.int64)[:, None] * x_stride
    run = weight + outputs.to(tl.int64)[:, None] * weight_stride
    part_end = first + part_inputs
    for start in tl.range(first, last, STEP, num_stages=STAGES):
        at = start + tl.arange(0, STEP)
        if WHOLE:
            values = tl.load(row + at[None, :])
            weights = tl.load(run + at[None, :])
        else:
            inside = (at < last)[None, :]
            values = tl.load(row + at[None, :], mask=inside, other=0.0)
            weights = tl.load(run + at[None, :], mask=inside, other=0.0)
        sums = added_product(weights, values.T, sums)
        if not SPLIT:
            if start + STEP >= part_end:
                total += sums
                sums = tl.zeros((BLOCK, ROWS), tl.float32)
                part_end += part_inputs
    return total + sums


@triton.jit(do_not_specialize=["tokens", "parts"])
def _full_linear(
    out,
    x,
    weight,
    bias,
    positions,
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
    WHOLE: tl.constexpr,
    MASKED: tl.constexpr,
    BIASED: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program is ROWS rows (axis 0) of BLOCK outputs (axis 1), or where SPLIT one part of their inputs (axis 2).

    A part's sum waits in `scratch` until the last of its tile's to arrive, by `counters`, adds them in order.

    `out` [tokens, width] in x's dtype, `weight` [outputs, inputs]. ADDED says that `out` holds the residual; MASKED
    that `positions` below 0 are tokens that are not there.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if MASKED:
        # all programs of these rows find the same: none of them counts the parts that arrived
        if all_masked(positions, rows, tokens):
            return
    outputs, there = tile_columns(width, tl.program_id(1), GATED, BLOCK)
    # rows and outputs that are not there stand for some that are, and are not stored
    outputs = tl.where(there, outputs, 0)
    read = tl.minimum(rows, tokens - 1)
    first = 0
    last = in_features
    if SPLIT:
        first = tl.program_id(2) * part_inputs
        last = tl.minimum(first + part_inputs, in_features)
    total = _sum_inputs(
        x,
        weight,
        first,
        last,
        part_inputs,
        read,
        outputs,
        x_stride,
        weight_stride,
        STEP,
        WHOLE,
        ROWS,
        BLOCK,
        SPLIT,
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
    positions: Tensor | None = None,
) -> Tensor:
    """Return x [..., in] times weight [out, in] transposed, plus bias [out]: [tokens, out] in x's dtype.

    x and weight are of one dtype. `norm` is applied to x's rows first. `activation` (one of `ACTIVATIONS`) is applied
    to the result; where the layer is `gated` its outputs are [gate | up], and the result is activation(gate) × up,
    [tokens, out / 2]. With `residual` [tokens, out] the result is added to it in place, and it is returned. Values are
    rounded to the dtype wherever separate operations would.

    Rows whose position in `positions` [tokens] int64 is below 0 are missing: their results are whatever the memory
    held, or anything else, and tiles of which all rows are missing read no weights. Raises ValueError or TypeError
    where shapes or dtypes do not fit.
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
        checked_positions(positions, rows.shape[0]),
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
    positions: Tensor | None,
    out: Tensor,
    activation: str | None,
    gated: bool,
    added: bool,
) -> None:
    tokens, in_features = x.shape
    columns = out.shape[1]
    if tokens == 0 or columns == 0:
        return
    call = (tokens, in_features, columns, gated, x.dtype)
    run = partial(_run, x, weight, bias, positions, out, activation, gated, added)
    launch = launch_for(*call, int4=False)
    try:
        run(launch)
    except OutOfResources as error:
        run(launch_that_fits(launch, error, *call, int4=False))


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    out: Tensor,
    activation: str | None,
    gated: bool,
    added: bool,
    launch: Launch,
) -> None:
    tokens, in_features = x.shape
    columns = out.shape[1]
    sums, counters = scratch_for(launch, tokens, weight.shape[0], x.device)
    step = _STEP_BYTES // x.element_size()
    _full_linear[launch.grid](
        out,
        x,
        weight,
        out if bias is None else bias.contiguous(),
        out if positions is None else positions,
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
        WHOLE=in_features % step == 0,
        MASKED=positions is not None,
        BIASED=bias is not None,
        GATED=gated,
        ACTIVATION=activation,
        ADDED=added,
        SPLIT=launch.split,
        ROWS=launch.tile.rows,
        BLOCK=launch.tile.outputs,
        STAGES=launch.tile.stages,
        num_warps=launch.tile.warps,
        num_stages=launch.tile.stages,
        enable_fp_fusion=False,  # multiply-adds are where the source has them, in every variant of the kernel
    )


@_full_linear_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    out: Tensor,
    activation: str | None,
    gated: bool,
    added: bool,
) -> None:
    return None
