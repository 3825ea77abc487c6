"""What the linear layers' GPU kernels share: how the sum over inputs is cut, the tiles, and what follows the sum.

The inputs are cut into a few parts, each summed for itself by the tensor cores, and the parts are added in order. How
many there are depends on the number of inputs alone: not on the rows, so that a row's result is the same to the bit
in every call, and not on the outputs, so that some outputs of a layer alone give the whole layer's bits. With many
tiles one program sums all parts of its tile. With few, a decode step's, each part has a program of its own, so that
all multiprocessors read: it leaves its sum in scratch memory, and the last to arrive at a tile adds all of them, in
order. Both ways add the same numbers in the same order.

A tile is outputs × tokens: the weights are the tensor cores' left operand, which they take from the registers that
the weights were unpacked into. With two warps a program Triton picks `mma.sync` on every GPU, whatever the tile's
number of tokens; with four or eight it turns to `wgmma` on Hopper, whose sums are the same to the bit (seen on an H200,
and tested on every GPU that runs the tests): those of INT4 weights once inputs and codes are put in the order in which
`mma.sync` takes them (`exeunt.kernels.int4_linear.ordered_triton`). On other GPUs than Hopper's all tiles have two
warps or one.
"""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803, N806

import logging
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from exeunt.kernels.arithmetic_triton import rounded
from exeunt.kernels.linear_rule import TILES, tiles
from exeunt.kernels.linear_tiles import Tile
from exeunt.kernels.rows.norm import RowNorm
from exeunt.kernels.tuned.launches import LaunchKey, leave_to_rule, measured_rows, tuned_launch

_log = logging.getLogger(__name__)

ACTIVATIONS: Final = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


MOST_COUNTERS: Final = 2048
MOST_SCRATCH: Final = 2**27
"""Bytes of parts' sums that are left in memory: more cannot be fast, and graphs would hold them."""
_counters: dict[tuple[int | None, int], Tensor] = {}


@dataclass(frozen=True, slots=True)
class Launch:
    """How one call runs."""

    grid: tuple[int, int, int]
    tile: Tile
    parts: int
    split: bool  # whether each part has a program of its own


def parts_of(in_features: int) -> int:
    """Into how many parts the sum over this many inputs is cut."""
    return max(1, min(TILES.most_parts, in_features // TILES.part_inputs))


def launch_for(
    tokens: int,
    in_features: int,
    outputs: int,
    gated: bool,
    dtype: torch.dtype,
    *,
    int4: bool,
    group_size: int = 0,
) -> Launch:
    """The launch for `tokens` rows of `dtype` and a result of `outputs` columns: as measured, else by the rule.

    `group_size` is that of INT4 weights.
    """
    width = 2 * outputs if gated else outputs
    tuned = tuned_launch(tokens, in_features, width, gated, dtype, int4=int4, group_size=group_size)
    rule = tiles()
    tile = rule.tile_for(tokens, in_features, width, dtype, int4=int4) if tuned is None else tuned.tile
    columns = tile.outputs // 2 if gated else tile.outputs
    across, down = triton.cdiv(outputs, columns), triton.cdiv(tokens, tile.rows)
    parts = parts_of(in_features)
    split = rule.splits(tokens, across * down, tile, int4=int4) if tuned is None else tuned.split
    split = split and parts > 1 and across * down <= MOST_COUNTERS
    split = split and 4 * parts * tokens * width <= MOST_SCRATCH
    return Launch((down, across, parts if split else 1), tile, parts, split)


def launch_that_fits(
    failed: Launch,
    error: OutOfResources,
    tokens: int,
    in_features: int,
    outputs: int,
    gated: bool,
    dtype: torch.dtype,
    *,
    int4: bool,
    group_size: int = 0,
) -> Launch:
    """The rule's launch of a call whose measured one needs more than the GPU has: with a warning, and from now on.

    The arguments behind `error` are those that `launch_for` took. Raises `error` where `failed` was not measured.
    """
    width = 2 * outputs if gated else outputs
    key = LaunchKey(int4, dtype, in_features, width, gated, group_size, measured_rows(tokens))
    if leave_to_rule(key):
        kind = "int4" if int4 else "full"
        _log.warning(
            "The measured launch %s of %s weights %d x %d does not run here, the rule's is taken from now on: %s",
            failed.tile,
            kind,
            width,
            in_features,
            error,
        )
    launch = launch_for(tokens, in_features, outputs, gated, dtype, int4=int4, group_size=group_size)
    if launch == failed:
        raise error
    return launch


def scratch_for(launch: Launch, tokens: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for the sums of parts [parts, tokens, columns] float32, and zeroed counters of those that arrived.

    Counters are shared by all calls on one stream, each call leaves zeros. Calls that are captured into graphs share
    one set per device: two such graphs must not run at the same time.
    """
    if not launch.split:
        nothing = torch.empty(1, dtype=torch.float32, device=device)
        return nothing, nothing
    sums = torch.empty(launch.parts * tokens * columns, dtype=torch.float32, device=device)
    return sums, _counters_on(device)


def _counters_on(device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=device)
    captured = (device.index, -1)
    if torch.cuda.is_current_stream_capturing():
        kept = _counters.get(captured)
        # never zeroed outside of a graph: this graph zeroes its own at every replay
        return torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=device) if kept is None else kept
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    for each in (captured, key):
        if each not in _counters:
            _counters[each] = torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=device)
    return _counters[key]


def checked_rows(x: Tensor, in_features: int, norm: RowNorm | None) -> Tensor:
    """View x [..., in] as dense rows [tokens, in], normalised where a norm is given."""
    if x.shape[-1] != in_features:
        raise ValueError(f"the input has {x.shape[-1]} features, the weight takes {in_features}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"the GPU's linear layers take float32, bfloat16 or float16, not {x.dtype}")
    rows = x.reshape(-1, in_features)
    if norm is not None:
        from exeunt.kernels.rows.triton import layer_norm_triton, rms_norm_triton

        if norm.kind == "rms":
            return rms_norm_triton(rows, norm.weight, norm.eps)
        return layer_norm_triton(rows, norm.weight, norm.bias, norm.eps)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def checked_out(
    x: Tensor,
    tokens: int,
    out_features: int,
    bias: Tensor | None,
    activation: str | None,
    gated: bool,
    residual: Tensor | None,
) -> Tensor:
    """The tensor [tokens, out] that a kernel writes to: the residual, or an empty one. Raises ValueError as needed."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"the activation is {activation!r}, the GPU's linear layers know {', '.join(ACTIVATIONS)}"
        )
    if gated and (activation is None or out_features % 2):
        raise ValueError(f"a gated layer has an activation and an even number of outputs, not {out_features}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"the bias is {list(bias.shape)}, the weight gives {out_features} features")
    columns = out_features // 2 if gated else out_features
    if residual is None:
        return torch.empty((tokens, columns), dtype=x.dtype, device=x.device)
    if residual.shape != (tokens, columns) or residual.dtype != x.dtype or residual.stride(1) != 1:
        raise ValueError(
            f"the residual is {list(residual.shape)} {residual.dtype} with strides {list(residual.stride())}, "
            f"expected dense rows [{tokens}, {columns}] {x.dtype}"
        )
    return residual


def checked_positions(positions: Tensor | None, tokens: int) -> Tensor | None:
    """The rows' positions [tokens] int64 as they are, or None. Raises ValueError where they are anything else."""
    if positions is None:
        return None
    if positions.shape != (tokens,) or positions.dtype != torch.int64 or not positions.is_contiguous():
        raise ValueError(
            f"the positions are {list(positions.shape)} {positions.dtype} with strides "
            f"{list(positions.stride())}, expected dense [{tokens}] {torch.int64}"
        )
    return positions


@triton.jit
def all_masked(positions, rows, tokens):
    """Whether a tile has none of its rows: those at positions below 0 are missing, and those beyond `tokens`."""
    return tl.max(tl.load(positions + rows, mask=rows < tokens, other=-1), 0) < 0


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation of x, in float32."""
    if ACTIVATION == "relu":
        y = tl.where(x < 0, 0.0, x)  # NaN stays
    elif ACTIVATION == "silu":
        y = x / (1 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:  # with tanh, as 0.5 × (1 + tanh u) = sigmoid(2u)
        y = x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    return y


@triton.jit
def tile_columns(columns, tile, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """The weight's outputs [BLOCK] that a tile of a result with so many columns sums, and which of them there are."""
    lane = tl.arange(0, BLOCK)
    if GATED:
        within = tile * (BLOCK // 2) + lane % (BLOCK // 2)
        outputs = within + (lane // (BLOCK // 2)) * columns
    else:
        within = tile * BLOCK + lane
        outputs = within
    return outputs, within < columns


@triton.jit
def leave_part(scratch, sums, part, rows, outputs, tokens, width, inside):
    """Store the sums of one part [outputs, rows] where `add_parts` finds them."""
    row = part.to(tl.int64) * tokens + rows
    tl.store(scratch + row[None, :] * width + outputs[:, None], sums, mask=inside)


@triton.jit
def is_last(counters, parts):
    """Whether this program is the last of `parts` to arrive at its tile; what the others stored is then there."""
    counter = counters + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.debug_barrier()  # all of this program's stores are before the counter's release
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def add_parts(scratch, parts, rows, outputs, tokens, width, inside, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of all parts [BLOCK outputs, ROWS], added in order."""
    total = tl.zeros((BLOCK, ROWS), tl.float32)
    for part in range(parts):
        row = tl.cast(part, tl.int64) * tokens + rows
        place = scratch + row[None, :] * width + outputs[:, None]
        # the level that all multiprocessors share: others wrote these
        total += tl.load(place, mask=inside, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def halves(total, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Split a gated tile's sums [BLOCK, ROWS] into those of gate and up [BLOCK / 2, ROWS]."""
    return tl.split(tl.permute(tl.reshape(total, (2, BLOCK // 2, ROWS)), (1, 2, 0)))


@triton.jit
def finish(
    out,
    bias,
    gate,
    up,
    rows,
    columns,
    width,
    out_stride,
    inside,
    BIASED: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADDED: tl.constexpr,
):
    """Store what the layer makes of its sums [columns, rows], rounded where PyTorch's separate operations round."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    there = columns < width
    if BIASED:
        gate += tl.load(bias + columns, mask=there, other=0.0).to(tl.float32)[:, None]
    value = rounded(gate, DTYPE).to(tl.float32)
    if ACTIVATION is not None:
        value = rounded(activated(value, ACTIVATION), DTYPE).to(tl.float32)
    if GATED:
        if BIASED:
            up += tl.load(bias + width + columns, mask=there, other=0.0).to(tl.float32)[:, None]
        value = rounded(value * rounded(up, DTYPE).to(tl.float32), DTYPE).to(tl.float32)
    place = out + rows.to(tl.int64)[None, :] * out_stride + columns[:, None]
    if ADDED:
        value = tl.load(place, mask=inside, other=0.0).to(tl.float32) + value
    tl.store(place, rounded(value, DTYPE), mask=inside)


@triton.jit
def join(
    out,
    bias,
    scratch,
    counters,
    sums,
    rows,
    tokens,
    width,
    parts,
    out_stride,
    BIASED: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Finish a tile: from the sums of all parts, or (SPLIT) of this program's part, once all have arrived."""
    OWN: tl.constexpr = BLOCK // 2 if GATED else BLOCK
    columns = tl.program_id(1) * OWN + tl.arange(0, OWN)
    inside = (columns < width)[:, None] & (rows < tokens)[None, :]
    if SPLIT:
        outputs, there = tile_columns(width, tl.program_id(1), GATED, BLOCK)
        whole = 2 * width if GATED else width
        leave_part(
            scratch,
            sums,
            tl.program_id(2),
            rows,
            outputs,
            tokens,
            whole,
            there[:, None] & (rows < tokens)[None, :],
        )
        if is_last(counters, parts):
            gate = add_parts(scratch, parts, rows, columns, tokens, whole, inside, ROWS, OWN)
            up = gate
            if GATED:
                up = add_parts(scratch, parts, rows, columns + width, tokens, whole, inside, ROWS, OWN)
            finish(
                out,
                bias,
                gate,
                up,
                rows,
                columns,
                width,
                out_stride,
                inside,
                BIASED,
                GATED,
                ACTIVATION,
                ADDED,
            )
    elif GATED:
        gate, up = halves(sums, ROWS, BLOCK)
        finish(
            out, bias, gate, up, rows, columns, width, out_stride, inside, BIASED, GATED, ACTIVATION, ADDED
        )
    else:
        finish(
            out, bias, sums, sums, rows, columns, width, out_stride, inside, BIASED, GATED, ACTIVATION, ADDED
        )
