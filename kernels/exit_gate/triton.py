"""Which rows leave at an exit, on a GPU: chunks of a row's logits by programs of their own, then one program a row.

Chunks have one size whatever the call, so that a row's decision does not depend on the rows beside it. Every row is
looked at: counting those that pass the screen would mean waiting for the device.
"""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# ruff: noqa: N803

import math
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from exeunt.kernels.exit_gate.reference import LEAST_DOUBT, JudgeParts
from exeunt.kernels.token_draw.triton import CHUNK, aligned, lanes_for

_WARPS: Final = 4
_MOST_ODDS: Final = LEAST_DOUBT - math.log(-math.expm1(LEAST_DOUBT))
"""The log-odds of a top probability that float32 cannot tell from 1."""


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def _probe_logits(out, units, weight, bias, count, UNITS: tl.constexpr):
    """w · GELU(u) + b of each row's units."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, UNITS)
    inside = lanes < count
    unit = tl.load(units + row * count + lanes, mask=inside, other=0.0)
    factor = tl.load(weight + lanes, mask=inside, other=0.0)
    total = tl.sum(tl.where(inside, _gelu(unit) * factor, 0.0), axis=0)
    tl.store(out + row, total + tl.load(bias))


@triton.jit
def _chunk_tops(sums, faults, largest, logits, vocab, chunks, TOPS: tl.constexpr, CHUNK: tl.constexpr):
    """Of each chunk: its largest logits, descending, and the sum of exp(logit - the largest)."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    lanes = tl.arange(0, CHUNK)
    at = chunk * CHUNK + lanes
    logit = tl.load(logits + row * vocab + at, mask=at < vocab, other=-float("inf"))
    fault = (logit != logit) | (logit == float("inf"))
    rest = tl.where(fault, -float("inf"), logit)
    top = tl.max(rest, axis=0)
    total = tl.sum(tl.exp(rest - tl.where(top > -float("inf"), top, 0.0)), axis=0)
    place = row * chunks + chunk
    tl.store(sums + place, total)
    tl.store(faults + place, tl.max(fault.to(tl.int32), axis=0))
    for number in range(TOPS):
        best = tl.max(rest, axis=0)
        tl.store(largest + place * TOPS + number, best)
        first = tl.min(tl.where(rest == best, lanes, CHUNK), axis=0)  # one of equals: the others come next
        rest = tl.where(lanes == first, -float("inf"), rest)


@triton.jit
def _decide(
    confidence,
    leaves,
    looked,
    passed,
    sums,
    faults,
    largest,
    probe,
    thresholds,
    listed_sure,
    combine,
    units,
    judge_tops,
    judge_bias,
    judge_weight,
    judge_output_bias,
    screen_ratio,
    list_ratio,
    least_doubt,
    most_odds,
    unit_count,
    chunks,
    TOPS: tl.constexpr,
    JUDGED: tl.constexpr,
    SCREENED: tl.constexpr,
    LISTED: tl.constexpr,
    CHUNKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The features of each row's logits, its confidence, and, where there are thresholds, whether it leaves.

    Where a shortlist was asked before, how sure it was says which rows these logits decide about.
    """
    row = tl.program_id(0).to(tl.int64)
    candidate = tl.arange(0, CANDIDATES)
    there = candidate < chunks * TOPS
    rest = tl.load(largest + row * chunks * TOPS + candidate, mask=there, other=-float("inf"))
    highest = tl.max(rest, axis=0)
    base = tl.where(highest > -float("inf"), highest, 0.0)

    chunk = tl.arange(0, CHUNKS)
    inside = chunk < chunks
    top = tl.load(largest + (row * chunks + chunk) * TOPS, mask=inside, other=-float("inf"))
    part = tl.load(sums + row * chunks + chunk, mask=inside, other=0.0)
    fault = tl.max(tl.load(faults + row * chunks + chunk, mask=inside, other=0), axis=0)
    total = tl.sum(part * tl.exp(top - base), axis=0)
    log_total = tl.log(total)

    opinion = tl.load(probe + row)
    second = highest
    if JUDGED:
        lanes = tl.arange(0, UNITS)
        known = lanes < unit_count
        unit = tl.load(units + row * unit_count + lanes, mask=known, other=0.0)
        unit += tl.load(judge_bias + lanes, mask=known, other=0.0)
        for number in range(TOPS):
            best = tl.max(rest, axis=0)
            second = tl.where(number == 1, best, second)
            first = tl.min(tl.where(rest == best, candidate, CANDIDATES), axis=0)
            rest = tl.where(candidate == first, -float("inf"), rest)
            factor = tl.load(judge_tops + number * unit_count + lanes, mask=known, other=0.0)
            unit += ((best - base) - log_total) * factor
        weight = tl.load(judge_weight + lanes, mask=known, other=0.0)
        opinion = tl.sum(tl.where(known, _gelu(unit) * weight, 0.0), axis=0) + tl.load(judge_output_bias)
    else:
        first = tl.min(tl.where(rest == highest, candidate, CANDIDATES), axis=0)
        second = tl.max(tl.where(candidate == first, -float("inf"), rest), axis=0)

    # log(p / (1 - p)) of p = 1 / total
    odds = tl.where(-log_total > least_doubt, most_odds, -tl.log(total - 1.0))
    logit = tl.load(combine) * opinion + tl.load(combine + 1) * odds
    logit += tl.load(combine + 2) * (highest - second)
    logit += tl.load(combine + 3)
    sure = tl.math.div_rn(1.0, 1.0 + tl.exp(-logit))
    sure = tl.where((fault == 0) & (highest > -float("inf")), sure, float("nan"))
    if SCREENED:
        threshold = tl.load(thresholds + row)
        doubt = tl.math.div_rn(1.0, 1.0 + tl.exp(-tl.load(probe + row)))
        passes = (
            doubt >= threshold * screen_ratio
        )  # 0 times an infinite threshold is NaN, and with it no row passes
        tl.store(looked + row, passes.to(tl.int8))
        told = sure
        decides = passes
        if LISTED:
            before = tl.load(listed_sure + row)
            decides = passes & (before >= threshold * list_ratio)
            told = tl.where(decides, sure, before)
        leave = decides & (sure >= threshold)
        tl.store(leaves + row, leave.to(tl.int8))
        tl.store(passed + row, (decides if LISTED else leave).to(tl.int8))
        sure = tl.where(passes, told, 0.0)
    tl.store(confidence + row, sure)


def probe_logit_triton(units: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return w · GELU(u) + b [K] float32 of units u [K, units], weight w [units] and bias b []; all float32."""
    logit: Tensor = _probe_logit_op(units, weight, bias)
    return logit


def gate_confidence_triton(
    probe_logit: Tensor, logits: Tensor, combine: Tensor, units: Tensor | None, judge: JudgeParts | None
) -> Tensor:
    """Return what `gate_confidence` returns; its arguments are those, with shapes and dtypes already checked."""
    sure: Tensor = _gate_op(probe_logit, logits, None, 0.0, combine, units, *_parts(judge), None, 0.0)[0]
    return sure


def decide_triton(
    probe_logit: Tensor,
    logits: Tensor,
    thresholds: Tensor,
    screen_ratio: float,
    combine: Tensor,
    units: Tensor | None,
    judge: JudgeParts | None,
    listed: Tensor | None = None,
    list_ratio: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `gate_decisions` returns: confidence [K] float32, leaves, looked and passed [K] bool.

    Where a shortlist was asked before, `listed` [K] float32 is the confidence by its logits, and `logits` and what
    reads them are those that confirm it.
    """
    decided: tuple[Tensor, Tensor, Tensor, Tensor] = _gate_op(
        probe_logit, logits, thresholds, screen_ratio, combine, units, *_parts(judge), listed, list_ratio
    )
    return decided


def _parts(judge: JudgeParts | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None, None) if judge is None else judge


@torch.library.custom_op("exeunt::probe_logit", mutates_args=())
def _probe_logit_op(units: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows, count = units.shape
    out = torch.empty(rows, dtype=torch.float32, device=units.device)
    if rows == 0:
        return out
    wide = lanes_for(count)
    _probe_logits[(rows,)](
        out, aligned(units), aligned(weight), bias, count, UNITS=wide, num_warps=_WARPS, num_stages=1
    )
    return out


@_probe_logit_op.register_fake
def _(units: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return units.new_empty(units.shape[0])


@torch.library.custom_op("exeunt::exit_gate", mutates_args=())
def _gate_op(
    probe_logit: Tensor,
    logits: Tensor,
    thresholds: Tensor | None,
    screen_ratio: float,
    combine: Tensor,
    units: Tensor | None,
    judge_tops: Tensor | None,
    judge_bias: Tensor | None,
    judge_weight: Tensor | None,
    judge_output_bias: Tensor | None,
    listed: Tensor | None,
    list_ratio: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (rows, vocab), device = logits.shape, logits.device
    confidence = torch.empty(rows, dtype=torch.float32, device=device)
    leaves = torch.empty(rows, dtype=torch.bool, device=device)
    looked = torch.empty(rows, dtype=torch.bool, device=device)
    passed = torch.empty(rows, dtype=torch.bool, device=device)
    if rows == 0:
        return confidence, leaves, looked, passed
    chunks, count = triton.cdiv(vocab, CHUNK), 2 if judge_tops is None else judge_tops.shape[0]
    sums = torch.empty((rows, chunks), dtype=torch.float32, device=device)
    faults = torch.empty((rows, chunks), dtype=torch.int32, device=device)
    largest = torch.empty((rows, chunks, count), dtype=torch.float32, device=device)
    _chunk_tops[(rows, chunks)](
        sums,
        faults,
        largest,
        aligned(logits),
        vocab,
        chunks,
        TOPS=count,
        CHUNK=CHUNK,
        num_warps=_WARPS,
        num_stages=1,
    )
    probe_logit, combine = probe_logit.contiguous(), combine.contiguous()
    unit_count = 1 if units is None else units.shape[1]
    # where there is no judge, no threshold, or no shortlist before, nothing reads what stands in for them
    read = [
        combine if part is None else aligned(part)
        for part in (units, judge_tops, judge_bias, judge_weight, judge_output_bias)
    ]
    _decide[(rows,)](
        confidence,
        leaves.view(torch.int8),
        looked.view(torch.int8),
        passed.view(torch.int8),
        sums,
        faults,
        largest,
        probe_logit,
        probe_logit if thresholds is None else thresholds.contiguous(),
        probe_logit if listed is None else listed.contiguous(),
        combine,
        *read,
        screen_ratio,
        list_ratio,
        LEAST_DOUBT,
        _MOST_ODDS,
        unit_count,
        chunks,
        TOPS=count,
        JUDGED=judge_tops is not None,
        SCREENED=thresholds is not None,
        LISTED=listed is not None,
        CHUNKS=lanes_for(chunks),
        CANDIDATES=lanes_for(chunks * count),
        UNITS=lanes_for(unit_count),
        num_warps=_WARPS,
        num_stages=1,
    )
    return confidence, leaves, looked, passed


@_gate_op.register_fake
def _(
    probe_logit: Tensor,
    logits: Tensor,
    thresholds: Tensor | None,
    screen_ratio: float,
    combine: Tensor,
    units: Tensor | None,
    judge_tops: Tensor | None,
    judge_bias: Tensor | None,
    judge_weight: Tensor | None,
    judge_output_bias: Tensor | None,
    listed: Tensor | None,
    list_ratio: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    decided = logits.new_empty((3, rows), dtype=torch.bool)
    return logits.new_empty(rows), decided[0].clone(), decided[1].clone(), decided[2].clone()
