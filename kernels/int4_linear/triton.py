"""The INT4 linear layer on a GPU: weights are unpacked in registers, on their way to the tensor cores.

One kernel for decode and prefill (see `exeunt.kernels.linear_parts` for the cut of the sum and the tiles). Weights are
made of codes in the activations' dtype (`exeunt.kernels.codes_triton`), and products are summed in float32.
"""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803, N806, SIM102, SIM108 - a condition known at compile time stands alone

from functools import partial
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from exeunt.kernels.arithmetic_triton import added_product
from exeunt.kernels.codes_triton import weights
from exeunt.kernels.int4_linear.dispatch import PackedWeight
from exeunt.kernels.int4_linear.ordered_triton import in_places, order_inputs
from exeunt.kernels.int4_linear.pairs import PairedInt4, pack_pairs, unroll_of
from exeunt.kernels.int4_linear.weight import Int4Weight
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

_WARPS_OF_MMA: Final = 2  # tiles of more warps have `wgmma`, and their inputs in order
_STEP: Final = 64  # bytes of an output that are unpacked at once, at most
_STEP_FLOAT32: Final = 32  # without tensor cores a step's operands all lie in registers


@triton.jit
def _sum_pairs(
    x,
    codes,
    scaling,
    first,
    last,
    part_pairs,
    rows,
    outputs,
    in_features,
    x_stride,
    code_stride,
    pair_stride,
    plane_stride,
    GROUP: tl.constexpr,
    TURNS: tl.constexpr,
    STEP: tl.constexpr,
    UNROLL: tl.constexpr,
    WHOLE: tl.constexpr,
    ORDERED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The products [BLOCK outputs, ROWS] over pairs `first` to `last` - 1.

    Each part is summed for itself and they are added in order, in one loop: what is loaded ahead is so across parts.
    Where the inputs are no WHOLE number of pairs, what is missing of them is taken as zero. ORDERED ones are in their
    places, and the codes are put there.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    PLACES: tl.constexpr = TURNS * STEP if ORDERED else GROUP
    total = tl.zeros((BLOCK, ROWS), tl.float32)
    sums = tl.zeros((BLOCK, ROWS), tl.float32)
    part_end = (first + part_pairs) * TURNS
    row = x + rows.to(tl.int64)[:, None] * x_stride
    own = scaling + outputs
    for base in tl.range(first * TURNS, last * TURNS, UNROLL, num_stages=STAGES):
        for ahead in tl.static_range(UNROLL):
            pair = (base + ahead) // TURNS
            byte = (base + ahead) % TURNS * STEP + tl.arange(0, STEP)
            at = (pair * (2 * PLACES) + byte)[None, :]
            run = codes + tl.cast(pair, tl.int64) * code_stride + outputs[:, None] * GROUP + byte[None, :]
            inside = (byte < GROUP)[None, :]
            if WHOLE:
                low_x = tl.load(row + at)
                high_x = tl.load(row + at + PLACES)
            else:
                low_x = tl.load(row + at, mask=inside & (at < in_features), other=0.0)
                high_x = tl.load(row + at + PLACES, mask=inside & (at + PLACES < in_features), other=0.0)
            if GROUP == TURNS * STEP:  # known when it is compiled
                packed = tl.load(run)
            else:
                packed = tl.load(run, mask=inside, other=0)
            low_params = tl.load(own + pair * pair_stride)
            high_params = tl.load(own + pair * pair_stride + plane_stride)
            if ORDERED:
                packed = in_places(packed, BLOCK, STEP)
            low, high = weights(packed, low_params, high_params, DTYPE)
            sums = added_product(low, low_x.T, sums)
            sums = added_product(high, high_x.T, sums)
        if not SPLIT:
            if base + UNROLL >= part_end:
                total += sums
                sums = tl.zeros((BLOCK, ROWS), tl.float32)
                part_end += part_pairs * TURNS
    return total + sums


@triton.jit(do_not_specialize=["tokens", "parts", "part_pairs", "pairs"])
def _int4_linear(
    out,
    x,
    codes,
    scaling,
    bias,
    positions,
    scratch,
    counters,
    tokens,
    in_features,
    width,
    parts,
    part_pairs,
    pairs,
    out_stride,
    x_stride,
    code_stride,
    pair_stride,
    plane_stride,
    GROUP: tl.constexpr,
    TURNS: tl.constexpr,
    STEP: tl.constexpr,
    UNROLL: tl.constexpr,
    WHOLE: tl.constexpr,
    ORDERED: tl.constexpr,
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

    `out` [tokens, width] in x's dtype; codes and scaling are those of `PairedInt4`. ADDED says that `out` holds the
    residual; MASKED that `positions` below 0 are tokens that are not there.
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
    last = pairs
    if SPLIT:
        first = tl.program_id(2) * part_pairs
        last = tl.minimum(first + part_pairs, pairs)
    total = _sum_pairs(
        x,
        codes,
        scaling,
        first,
        last,
        part_pairs,
        read,
        outputs,
        in_features,
        x_stride,
        code_stride,
        pair_stride,
        plane_stride,
        GROUP,
        TURNS,
        STEP,
        UNROLL,
        WHOLE,
        ORDERED,
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


def int4_linear_triton(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    norm: RowNorm | None = None,
    activation: str | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Return x [..., in] times the INT4 weight transposed, plus bias [out]: [tokens, out] in x's dtype.

    `norm` is applied to x's rows first. `activation` (one of `ACTIVATIONS`) is applied to the result; where the layer
    is `gated` its outputs are [gate | up], and the result is activation(gate) × up, [tokens, out / 2]. With `residual`
    [tokens, out] the result is added to it in place, and it is returned. Values are rounded to the dtype wherever
    separate operations would. A canonical weight is repacked for this call alone.

    Rows whose position in `positions` [tokens] int64 is below 0 are missing: their results are whatever the memory
    held, or anything else, and tiles of which all rows are missing read no weights. Raises ValueError or TypeError
    where shapes or dtypes do not fit.
    """
    if isinstance(weight, Int4Weight):
        weight = pack_pairs(weight)
    if not isinstance(weight, PairedInt4):
        raise TypeError("the INT4 weight is packed for the CPU, the GPU's kernel reads its own layout")
    rows = checked_rows(x, weight.in_features, norm)
    out = checked_out(rows, rows.shape[0], weight.out_features, bias, activation, gated, residual)
    _int4_linear_op(
        rows,
        weight.codes,
        weight.params,
        bias,
        checked_positions(positions, rows.shape[0]),
        out,
        weight.group_size,
        activation,
        gated,
        residual is not None,
    )
    return out


@torch.library.custom_op("exeunt::int4_linear", mutates_args=("out",))
def _int4_linear_op(
    x: Tensor,
    codes: Tensor,
    params: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    out: Tensor,
    group_size: int,
    activation: str | None,
    gated: bool,
    added: bool,
) -> None:
    tokens, in_features = x.shape
    columns = out.shape[1]
    if tokens == 0 or columns == 0:
        return
    call = (tokens, in_features, columns, gated, x.dtype)
    run = partial(_run, x, codes, params, bias, positions, out, group_size, activation, gated, added)
    launch = launch_for(*call, int4=True, group_size=group_size)
    try:
        run(launch)
    except OutOfResources as error:
        run(launch_that_fits(launch, error, *call, int4=True, group_size=group_size))


def _run(
    x: Tensor,
    codes: Tensor,
    params: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    out: Tensor,
    group_size: int,
    activation: str | None,
    gated: bool,
    added: bool,
    launch: Launch,
) -> None:
    tokens, in_features = x.shape
    columns = out.shape[1]
    sums, counters = scratch_for(launch, tokens, codes.shape[1], x.device)
    pairs, unroll = codes.shape[0], unroll_of(group_size)
    places = max(32, triton.next_power_of_2(group_size))
    step = min(places, _STEP_FLOAT32 if x.dtype == torch.float32 else _STEP)
    ordered = launch.tile.warps > _WARPS_OF_MMA
    if ordered:
        x = order_inputs(x, 2 * pairs, group_size, places)
    _int4_linear[launch.grid](
        out,
        x,
        codes,
        params,
        out if bias is None else bias.contiguous(),
        out if positions is None else positions,
        sums,
        counters,
        tokens,
        in_features,
        columns,
        launch.parts,
        triton.cdiv(pairs, unroll * launch.parts) * unroll,
        pairs,
        out.stride(0),
        x.stride(0),
        codes.stride(0),
        params.stride(0),
        params.stride(1),
        GROUP=group_size,
        TURNS=places // step,
        STEP=step,
        UNROLL=unroll,
        WHOLE=ordered or (places == group_size and in_features == 2 * group_size * pairs),
        ORDERED=ordered,
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


@_int4_linear_op.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    params: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    out: Tensor,
    group_size: int,
    activation: str | None,
    gated: bool,
    added: bool,
) -> None:
    return None
