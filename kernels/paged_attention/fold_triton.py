"""How the sums of splits become one: in ascending order, by the kernel that attends or by one of its own."""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803

import triton
import triton.language as tl


@triton.jit
def shares(largest, other):
    """The factors that bring sums under `largest` and `other` under the larger of the two, and that."""
    together = tl.maximum(largest, other)
    base = tl.where(together == float("-inf"), 0.0, together)
    return tl.exp2(largest - base), tl.exp2(other - base), together


@triton.jit(do_not_specialize=["splits", "window"])
def fold_kernel(
    out,
    partial_sums,
    partial_stats,
    positions,
    splits,
    position_stride,
    window,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Fold the splits of one token and head in ascending order, as a program of its own would have."""
    token = tl.program_id(0).to(tl.int64)
    line = token * HEADS + tl.program_id(1)
    dims = tl.arange(0, DIMS)
    inside = dims < HEAD_DIM
    position = tl.load(positions + token * position_stride).to(tl.int32)
    last = position // SPLIT
    first = position * 0
    if WINDOWED:
        first = tl.maximum(position - window + 1, 0) // SPLIT
    largest = tl.full((1,), float("-inf"), tl.float32)
    weight = tl.zeros((1,), tl.float32)
    total = tl.zeros((DIMS,), tl.float32)
    if position >= 0:
        for split in range(first, last + 1, 4):  # four at once, so that their loads overlap
            stats = partial_stats + (line * splits + split) * 2
            sums = partial_sums + (line * splits + split) * HEAD_DIM + dims
            m0, w0, s0 = _partial(stats, sums, last - split, inside)
            m1, w1, s1 = _partial(stats + 2, sums + HEAD_DIM, last - split - 1, inside)
            m2, w2, s2 = _partial(stats + 4, sums + 2 * HEAD_DIM, last - split - 2, inside)
            m3, w3, s3 = _partial(stats + 6, sums + 3 * HEAD_DIM, last - split - 3, inside)
            largest, weight, total = _folded(largest, weight, total, m0, w0, s0)
            largest, weight, total = _folded(largest, weight, total, m1, w1, s1)
            largest, weight, total = _folded(largest, weight, total, m2, w2, s2)
            largest, weight, total = _folded(largest, weight, total, m3, w3, s3)
        total = total / weight
    tl.store(out + line * HEAD_DIM + dims, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _partial(stats, sums, left, inside):
    """A split's largest score, weight and sums; those of no keys at all behind the last split (`left` < 0)."""
    one = tl.arange(0, 1)
    there = one <= left
    largest = tl.load(stats + one, mask=there, other=float("-inf"))
    weight = tl.load(stats + 1 + one, mask=there, other=0.0)
    return largest, weight, tl.load(sums, mask=inside & there, other=0.0)


@triton.jit
def _folded(largest, weight, total, other_largest, other_weight, other_total):
    kept, added, largest = shares(largest, other_largest)
    return largest, weight * kept + other_weight * added, total * kept + other_total * added
