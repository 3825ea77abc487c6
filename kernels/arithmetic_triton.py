"""Rounding and products as a GPU has them, under Triton's interpreter too."""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803

import os

import triton
import triton.language as tl

# Triton's interpreter multiplies the bits of bfloat16 as integers, truncates to it, and knows no inline assembly.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """The float32 value rounded to nearest even in DTYPE."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        result = tl.where(value != value, 0x7FC0, nearest).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(DTYPE)
    return result


@triton.jit
def added_product(left, right, sums):
    """Return sums + left × right, in float32."""
    if INTERPRETED:  # NumPy's order of adding depends on the shapes: in float64 that is lost in the rounding
        wide = tl.dot(left.to(tl.float64), right.to(tl.float64), out_dtype=tl.float64)
        result = sums + wide.to(tl.float32)
    else:
        result = tl.dot(left, right, sums, input_precision="ieee")
    return result
