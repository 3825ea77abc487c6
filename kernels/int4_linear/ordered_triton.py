"""Inputs of an INT4 linear layer in the order in which `mma.sync` takes them, for tiles that multiply by `wgmma`.

A thread's four bytes of codes lie together. So `mma.sync`, in a decode step, is given inputs 4t to 4t + 3 and 16 + 4t
to 16 + 4t + 3 of 32 by one thread, and multiplies half of each with one instruction, and the rest with the next one: a
permutation that no sum minds, but its last bit does. `wgmma` takes weights from registers in the order of its inputs.
So where it runs the inputs are put in that order beforehand, and the codes are told to lie so: the same products meet
in the same places, and the sums are the same to the bit.
"""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS: Final = 16
_COLUMNS: Final = 256
"""What a program puts in order at once."""


@triton.jit
def in_places(x, LINES: tl.constexpr, WIDTH: tl.constexpr):
    """x [LINES, WIDTH] with inputs 16h + 4t + 2m + e of every 32 in the place 16m + 8h + 2t + e."""
    parts = tl.reshape(x, (LINES, WIDTH // 32, 2, 4, 2, 2))
    return tl.reshape(tl.permute(parts, (0, 1, 4, 2, 3, 5)), (LINES, WIDTH))


@triton.jit
def _order_inputs(
    ordered,
    x,
    tokens,
    in_features,
    width,
    x_stride,
    GROUP: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    within = columns % PLACES
    inputs = columns // PLACES * GROUP + within
    there = rows < tokens
    given = tl.load(
        x + rows * x_stride + inputs, mask=there & (within < GROUP) & (inputs < in_features), other=0.0
    )
    put = in_places(given, ROWS, COLUMNS)
    tl.store(ordered + rows * width + columns, put, mask=there & (columns < width))


def order_inputs(x: Tensor, groups: int, group_size: int, places: int) -> Tensor:
    """Rows x [tokens, in] in the order of `mma.sync`'s places: [tokens, groups × places], in x's dtype.

    A group of inputs has `places`, a multiple of 32 and a power of two, of which its inputs need `group_size`; the
    others, and inputs that are not there, are zero.
    """
    tokens, in_features = x.shape
    width = groups * places
    ordered = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    _order_inputs[(triton.cdiv(tokens, _ROWS), triton.cdiv(width, _COLUMNS))](
        ordered,
        x,
        tokens,
        in_features,
        width,
        x.stride(0),
        GROUP=group_size,
        PLACES=places,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=4,
        num_stages=1,
    )
    return ordered
