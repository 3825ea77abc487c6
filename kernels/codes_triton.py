"""INT4 codes on their way to the tensor cores: exact numbers a constant away from the code, for an instruction each.

What multiplies such numbers takes the constant back out of the sum: Σ (bias + code) x = Σ code x + bias Σ x.
"""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803, N806

import os

import triton
import triton.language as tl

# Triton's interpreter multiplies the bits of bfloat16 as integers, truncates to it, and knows no inline assembly.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.constexpr_function
def bias_of(dtype):
    """What a code carries on its way through the tensor cores."""
    return {"bf16": 128.0, "fp16": 1024.0, "fp32": 16.0}[dtype.name]


@triton.constexpr_function
def _unpacking(dtype, ones):
    """The instructions that make numbers of four bytes, and with `ones` as many ones."""
    exponents, one = {"bf16": ("0x43434343", "0x3F803F80"), "fp16": ("0x64646464", "0x3C003C00")}[dtype.name]
    source = "$6" if ones else "$4"
    text = f"""{{
            .reg .b32 lows, highs;
            and.b32 lows, {source}, 0x0F0F0F0F;
            shr.u32 highs, {source}, 4;
            and.b32 highs, highs, 0x0F0F0F0F;
            prmt.b32 $0, lows, {exponents}, 0x4140;
            prmt.b32 $1, lows, {exponents}, 0x4342;
            prmt.b32 $2, highs, {exponents}, 0x4140;
            prmt.b32 $3, highs, {exponents}, 0x4342;
"""
    if ones:
        text += f"""            mov.b32 $4, {one};
            mov.b32 $5, {one};
"""
    return text + "            }"


@triton.constexpr_function
def _as_many(dtype, count):
    return (dtype,) * count


@triton.jit
def numbers(packed, DTYPE: tl.constexpr):
    """BIAS + code, in DTYPE and exact, of the low and of the high nibbles of bytes.

    BIAS is 128 in bfloat16 and 1024 in float16: a code goes into the low bits of the mantissa, a byte and the byte of
    the exponent make a number, two bytes to an instruction. In float32 it is 16.
    """
    if INTERPRETED or tl.float32 == DTYPE:
        low, high = _plainly(packed, DTYPE)
    else:
        low, high = tl.inline_asm_elementwise(
            _unpacking(DTYPE, False),
            "=r,=r,=r,=r,r",
            [packed],
            dtype=_as_many(DTYPE, 2),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def numbers_and_ones(packed, first, second, DTYPE: tl.constexpr):
    """`numbers`, and as many ones.

    The ones are laid out as the codes are, and so multiply the same operands as they stand. `first` and `second`, int32
    of the same shape, are not read: Triton loads ahead what products depend on, and what scales these does not count.
    """
    if INTERPRETED or tl.float32 == DTYPE:
        low, high = _plainly(packed, DTYPE)
        ones = (packed.to(tl.float32) * 0.0 + 1.0).to(DTYPE)
    else:
        low, high, ones = tl.inline_asm_elementwise(
            _unpacking(DTYPE, True),
            "=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
            [packed, first, second],
            dtype=_as_many(DTYPE, 3),
            is_pure=True,
            pack=4,
        )
    return low, high, ones


@triton.jit
def _plainly(packed, DTYPE: tl.constexpr):
    BIAS: tl.constexpr = bias_of(DTYPE)
    low = ((packed & 15).to(tl.float32) + BIAS).to(DTYPE)
    high = ((packed >> 4).to(tl.float32) + BIAS).to(DTYPE)
    return low, high
