"""INT4 codes and their parameters as the attention kernel multiplies them."""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803

import triton
import triton.language as tl


@triton.jit
def scale_and_middle(words):
    """(scale, minimum + 8 scale) float32 of params [keys], each two float16 in one int32: scale low, minimum high."""
    scale = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    minimum = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, minimum + 8.0 * scale


@triton.jit
def unpacked(packed, dtype: tl.constexpr, HOW: tl.constexpr):
    """The codes - 8 in the low and in the high nibbles of `packed` uint8, as numbers of the dtype, all exact.

    A code in the low bits of bfloat16's 128, or of float16's 1024, is 128 or 1024 plus the code: bytes are spread
    between the constant's, and 136 or 1032 is subtracted, two codes to an instruction.
    """
    if HOW == 1:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 lows, highs, one, less;
            mov.b32 one, 0x3F803F80;
            mov.b32 less, 0xC308C308;
            and.b32 lows, $4, 0x0F0F0F0F;
            shr.u32 highs, $4, 4;
            and.b32 highs, highs, 0x0F0F0F0F;
            prmt.b32 $0, lows, 0x43434343, 0x4140;
            prmt.b32 $1, lows, 0x43434343, 0x4342;
            prmt.b32 $2, highs, 0x43434343, 0x4140;
            prmt.b32 $3, highs, 0x43434343, 0x4342;
            fma.rn.bf16x2 $0, $0, one, less;
            fma.rn.bf16x2 $1, $1, one, less;
            fma.rn.bf16x2 $2, $2, one, less;
            fma.rn.bf16x2 $3, $3, one, less;
            }""",
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    elif HOW == 2:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 lows, highs, less;
            mov.b32 less, 0x64086408;
            and.b32 lows, $4, 0x0F0F0F0F;
            shr.u32 highs, $4, 4;
            and.b32 highs, highs, 0x0F0F0F0F;
            prmt.b32 $0, lows, 0x64646464, 0x4140;
            prmt.b32 $1, lows, 0x64646464, 0x4342;
            prmt.b32 $2, highs, 0x64646464, 0x4140;
            prmt.b32 $3, highs, 0x64646464, 0x4342;
            sub.rn.f16x2 $0, $0, less;
            sub.rn.f16x2 $1, $1, less;
            sub.rn.f16x2 $2, $2, less;
            sub.rn.f16x2 $3, $3, less;
            }""",
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        low = ((packed & 15).to(tl.int32) - 8).to(tl.float32).to(dtype)
        high = ((packed >> 4).to(tl.int32) - 8).to(tl.float32).to(dtype)
    return low, high
