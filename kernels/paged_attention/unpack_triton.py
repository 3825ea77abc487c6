"""The parameters of INT4 codes, and the weights that meet these, as the attention kernel multiplies them."""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803

import triton
import triton.language as tl

from exeunt.kernels.arithmetic_triton import INTERPRETED


@triton.jit
def scale_and_minimum(words):
    """(scale, minimum) float32 of params [keys], each two float16 in one int32: scale low, minimum high."""
    scale = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    minimum = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, minimum


@triton.jit
def narrowed(value, DTYPE: tl.constexpr):
    """float32 values rounded to DTYPE, in it and in float32: two by one instruction, and bits moved back."""
    if INTERPRETED or tl.float32 == DTYPE:
        narrow = value.to(DTYPE)
        wide = narrow.to(tl.float32)
    elif tl.bfloat16 == DTYPE:
        narrow, wide = tl.inline_asm_elementwise(
            """{
            cvt.rn.bf16x2.f32 $0, $4, $3;
            shl.b32 $1, $0, 16;
            and.b32 $2, $0, 0xFFFF0000;
            }""",
            "=&r,=r,=r,r,r",
            [value],
            dtype=(tl.bfloat16, tl.float32),
            is_pure=True,
            pack=2,
        )
    else:
        narrow, wide = tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.f16x2.f32 $0, $4, $3;
            mov.b32 {low, high}, $0;
            cvt.f32.f16 $1, low;
            cvt.f32.f16 $2, high;
            }""",
            "=&r,=r,=r,r,r",
            [value],
            dtype=(tl.float16, tl.float32),
            is_pure=True,
            pack=2,
        )
    return narrow, wide
