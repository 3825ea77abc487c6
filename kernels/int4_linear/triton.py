"""The INT4 linear layer on a GPU: weights are unpacked in registers, on their way to the tensor cores.

One kernel for decode and prefill (see `exeunt.kernels.linear_parts` for the cut of the sum and the tiles). A weight
is dequantised in float32 and rounded once, to the dtype of the activations; products are summed in float32.
"""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803, N806

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from exeunt.kernels.int4_linear.dispatch import PackedWeight
from exeunt.kernels.int4_linear.pairs import PairedInt4, pack_pairs, unroll_of
from exeunt.kernels.int4_linear.weight import Int4Weight
from exeunt.kernels.linear_parts import (
    INTERPRETED,
    TILES,
    added_product,
    checked_out,
    checked_rows,
    join,
    launch_for,
    rounded,
    scratch_for,
    tile_columns,
)
from exeunt.kernels.rows.norm import RowNorm

_STEP: Final = 64  # bytes of an output that are unpacked at once, at most
_STEP_FLOAT32: Final = 32  # without tensor cores a step's operands all lie in registers


@triton.jit
def _codes(tile):
    """16 + the code, in float32, of the low and of the high nibbles of bytes: the code goes into the mantissa of 16."""
    if INTERPRETED:
        low = ((((tile << 3) & 0x78) | 0x80).to(tl.uint32) << 16) | 0x41000000
        high = ((((tile >> 1) & 0x78) | 0x80).to(tl.uint32) << 16) | 0x41000000
        low, high = low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
    else:  # the same for four bytes at once: Triton itself would unpack every byte for each of the two nibbles
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high;
            shl.b32 low, $8, 3;
            shr.u32 high, $8, 1;
            lop3.b32 low, low, 0x78787878, 0x80808080, 0xEA;
            lop3.b32 high, high, 0x78787878, 0x80808080, 0xEA;
            prmt.b32 $0, low, 0x41, 0x4055;
            prmt.b32 $1, low, 0x41, 0x4155;
            prmt.b32 $2, low, 0x41, 0x4255;
            prmt.b32 $3, low, 0x41, 0x4355;
            prmt.b32 $4, high, 0x41, 0x4055;
            prmt.b32 $5, high, 0x41, 0x4155;
            prmt.b32 $6, high, 0x41, 0x4255;
            prmt.b32 $7, high, 0x41, 0x4355;
            }
            """,
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [tile],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def _weights(codes, scaling, DTYPE: tl.constexpr):
    """Weights [outputs, inputs] from 16 + their codes and their outputs' scaling [outputs]."""
    scale = (scaling & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    offset = ((scaling >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return rounded(tl.fma(codes, scale[:, None], (offset - 16 * scale)[:, None]), DTYPE)


@triton.jit
def _sum_part(
    x,
    codes,
    scaling,
    first,
    last,
    rows,
    outputs,
    live,
    there,
    in_features,
    x_stride,
    code_stride,
    pair_stride,
    plane_stride,
    GROUP: tl.constexpr,
    TURNS: tl.constexpr,
    STEP: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The products [BLOCK outputs, ROWS] over pairs `first` to `last` - 1."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    sums = tl.zeros((BLOCK, ROWS), tl.float32)
    row = x + rows.to(tl.int64)[:, None] * x_stride
    for base in tl.range(first * TURNS, last * TURNS, UNROLL, num_stages=STAGES):
        for ahead in tl.static_range(UNROLL):
            pair = (base + ahead) // TURNS
            byte = (base + ahead) % TURNS * STEP + tl.arange(0, STEP)
            at = pair * (2 * GROUP) + byte
            low_inside = at < in_features
            high_inside = at + GROUP < in_features
            tile_mask = there[:, None]
            if TURNS * STEP != GROUP:
                low_inside &= byte < GROUP
                high_inside &= byte < GROUP
                tile_mask &= (byte < GROUP)[None, :]
            low_x = tl.load(row + at[None, :], mask=live[:, None] & low_inside[None, :], other=0.0)
            high_x = tl.load(
                row + (at + GROUP)[None, :], mask=live[:, None] & high_inside[None, :], other=0.0
            )
            own = scaling + pair * pair_stride + outputs
            low_params = tl.load(own, mask=there, other=0)
            high_params = tl.load(own + plane_stride, mask=there, other=0)
            run = codes + tl.cast(pair, tl.int64) * code_stride + outputs[:, None] * GROUP
            low, high = _codes(tl.load(run + byte[None, :], mask=tile_mask, other=0))
            sums = added_product(_weights(low, low_params, DTYPE), low_x.T, sums)
            sums = added_product(_weights(high, high_params, DTYPE), high_x.T, sums)
    return sums


@triton.jit(do_not_specialize=["tokens", "parts", "part_pairs", "pairs"])
def _int4_linear(
    out,
    x,
    codes,
    scaling,
    bias,
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
            codes,
            scaling,
            part * part_pairs,
            tl.minimum((part + 1) * part_pairs, pairs),
            rows,
            outputs,
            live,
            there,
            in_features,
            x_stride,
            code_stride,
            pair_stride,
            plane_stride,
            GROUP,
            TURNS,
            STEP,
            UNROLL,
            ROWS,
            BLOCK,
            STAGES,
        )
    else:
        total = tl.zeros((BLOCK, ROWS), tl.float32)
        for part in range(parts):
            total += _sum_part(
                x,
                codes,
                scaling,
                part * part_pairs,
                tl.minimum((part + 1) * part_pairs, pairs),
                rows,
                outputs,
                live,
                there,
                in_features,
                x_stride,
                code_stride,
                pair_stride,
                plane_stride,
                GROUP,
                TURNS,
                STEP,
                UNROLL,
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


def int4_linear_triton(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    norm: RowNorm | None = None,
    activation: str | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Return x [..., in] times the INT4 weight transposed, plus bias [out]: [tokens, out] in x's dtype.

    `norm` is applied to x's rows first. `activation` (one of `ACTIVATIONS`) is applied to the result; where the layer
    is `gated` its outputs are [gate | up], and the result is activation(gate) × up, [tokens, out / 2]. With `residual`
    [tokens, out] the result is added to it in place, and it is returned. Values are rounded to the dtype wherever
    separate operations would. A canonical weight is repacked for this call alone. Raises ValueError or TypeError
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
    launch = launch_for(tokens, in_features, columns, gated, x.dtype)
    sums, counters = scratch_for(launch, tokens, codes.shape[1], x.device)
    pairs, unroll = codes.shape[0], unroll_of(group_size)
    width = max(32, triton.next_power_of_2(group_size))
    step = min(width, _STEP_FLOAT32 if x.dtype == torch.float32 else _STEP)
    _int4_linear[launch.grid](
        out,
        x,
        codes,
        params,
        out if bias is None else bias.contiguous(),
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
        TURNS=width // step,
        STEP=step,
        UNROLL=unroll,
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


@_int4_linear_op.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    params: Tensor,
    bias: Tensor | None,
    out: Tensor,
    group_size: int,
    activation: str | None,
    gated: bool,
    added: bool,
) -> None:
    return None
