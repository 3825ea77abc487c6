"""INT4 codes on their way to the tensor cores, a few instructions for eight of them.

A code is placed into the low bits of a mantissa: an exact number that is a constant too large. Attention multiplies
these as they are and takes the constant back out of its sums, Σ (bias + code) x = Σ code x + bias Σ x. A linear
layer's weights are made of them, two to an instruction.
"""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803, N806

import triton
import triton.language as tl

from exeunt.kernels.arithmetic_triton import INTERPRETED, rounded


@triton.constexpr_function
def bias_of(dtype):
    """What a code carries on its way through the tensor cores."""
    return {"bf16": 128.0, "fp16": 1024.0, "fp32": 16.0}[dtype.name]


@triton.constexpr_function
def _unpacked(dtype):
    """The instructions that make numbers of the four bytes in $4: `a` and `b` of low nibbles, `c` and `d` of high."""
    exponents = {"bf16": "0x43434343", "fp16": "0x64646464"}[dtype.name]
    return f""".reg .b32 lows, highs, a, b, c, d;
            and.b32 lows, $4, 0x0F0F0F0F;
            shr.u32 highs, $4, 4;
            and.b32 highs, highs, 0x0F0F0F0F;
            prmt.b32 a, lows, {exponents}, 0x4140;
            prmt.b32 b, lows, {exponents}, 0x4342;
            prmt.b32 c, highs, {exponents}, 0x4140;
            prmt.b32 d, highs, {exponents}, 0x4342;
"""


@triton.constexpr_function
def _given():
    """The instructions that make `a` to `d` the results."""
    return """mov.b32 $0, a;
            mov.b32 $1, b;
            mov.b32 $2, c;
            mov.b32 $3, d;"""


@triton.constexpr_function
def _as_numbers(dtype):
    """The instructions of `numbers`."""
    return f"""{{
            {_unpacked(dtype)}
            {_given()}
            }}"""


@triton.constexpr_function
def _as_weights(dtype):
    """The instructions of `weights`.

    The scales of the low nibbles are in $5 to $8, their middles in $9 to $12, those of the high ones behind: a word
    for each byte, and bytes whose weights lie in one word of the result have the same.
    """
    name, one, less = {
        "bf16": ("bf16x2", "0x3F803F80", "0xC308C308"),  # 1 and -(128 + 8)
        "fp16": ("f16x2", "0x3C003C00", "0xE408E408"),  # 1 and -(1024 + 8)
    }[dtype.name]
    return f"""{{
            {_unpacked(dtype)}
            .reg .b32 one, less;
            mov.b32 one, {one};
            mov.b32 less, {less};
            fma.rn.{name} a, a, one, less;
            fma.rn.{name} b, b, one, less;
            fma.rn.{name} c, c, one, less;
            fma.rn.{name} d, d, one, less;
            fma.rn.{name} a, a, $5, $9;
            fma.rn.{name} b, b, $7, $11;
            fma.rn.{name} c, c, $13, $17;
            fma.rn.{name} d, d, $15, $19;
            {_given()}
            }}"""


@triton.constexpr_function
def _doubling(dtype):
    """The instruction of `_twice`."""
    return f"cvt.rn.{'bf16x2' if dtype.name == 'bf16' else 'f16x2'}.f32 $0, $1, $1;"


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
        low = _plainly(packed & 15, DTYPE)
        high = _plainly(packed >> 4, DTYPE)
    else:
        low, high = tl.inline_asm_elementwise(
            _as_numbers(DTYPE),
            "=r,=r,=r,=r,r",
            [packed],
            dtype=_as_many(DTYPE, 2),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def _plainly(code, DTYPE: tl.constexpr):
    BIAS: tl.constexpr = bias_of(DTYPE)
    return (code.to(tl.float32) + BIAS).to(DTYPE)


@triton.jit
def weights(packed, low_params, high_params, DTYPE: tl.constexpr):
    """The weights of the low and of the high nibbles of bytes [outputs, inputs], in DTYPE.

    The params [outputs] int32 hold a group's float16 scale, low, and offset. A weight is (code - 8) × scale + middle,
    rounded once, where the middle is offset + 8 × scale; scale and middle are rounded to DTYPE themselves.
    """
    low_scale, low_middle = _scale_and_middle(low_params)
    high_scale, high_middle = _scale_and_middle(high_params)
    if INTERPRETED or tl.float32 == DTYPE:
        low = _weight(packed & 15, low_scale, low_middle, DTYPE)
        high = _weight(packed >> 4, high_scale, high_middle, DTYPE)
    else:
        low, high = tl.inline_asm_elementwise(
            _as_weights(DTYPE),
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [
                packed,
                _twice(low_scale, DTYPE)[:, None],
                _twice(low_middle, DTYPE)[:, None],
                _twice(high_scale, DTYPE)[:, None],
                _twice(high_middle, DTYPE)[:, None],
            ],
            dtype=_as_many(DTYPE, 2),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def _scale_and_middle(words):
    """Scale and offset + 8 × scale, float32, of words [outputs]."""
    scale = (words & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    offset = ((words >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, tl.fma(scale, 8.0, offset)


@triton.jit
def _twice(value, DTYPE: tl.constexpr):
    """float32 values [outputs] rounded to DTYPE, of 16 bits, in both halves of a word each."""
    return tl.inline_asm_elementwise(_doubling(DTYPE), "=r,r", [value], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _weight(code, scale, middle, DTYPE: tl.constexpr):
    wide_scale = rounded(scale, DTYPE).to(tl.float32)[:, None]
    wide_middle = rounded(middle, DTYPE).to(tl.float32)[:, None]
    return rounded(tl.fma(code.to(tl.float32) - 8.0, wide_scale, wide_middle), DTYPE)
