"""The price of exits against what they save, beside the curve that the paper reports, and whether ours lies below it.

The paper routes tokens of Mistral 7B by softmax confidence ("Variance Is Not Importance", arXiv 2604.20682): perplexity
over that of full depth at four shares of compute saved, by which it means layers that were skipped. Ours is shown by
that measure, and net of what exits themselves compute. Models differ in perplexity, so increases are compared relative
to full depth. Between points both curves are taken as straight, from nothing saved at no cost on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from exeunt.calibration.bootstrap import Measure
from exeunt.calibration.evaluation_table import EvaluationTable, Mode, ModeResult
from exeunt.calibration.papers import EXITS_PERPLEXITY, EXITS_TRADE_OFF
from exeunt.compression.variant import SkippedKV, Variant

Axis = Literal["layers", "net"]
"""Saved: the share of layers that tokens did not wait for (`passes_saved`), or of multiply-accumulates, net."""
Base = Literal["variant", "reference"]
"""What the increase of perplexity is relative to: the same variant with exits off, or the evaluation's reference."""

METHODS: Final[tuple[SkippedKV, ...]] = ("backfill", "propagate")
AXES: Final[tuple[Axis, ...]] = ("layers", "net")
BASES: Final[tuple[Base, ...]] = ("variant", "reference")


@dataclass(frozen=True, slots=True)
class TradePoint:
    """One threshold: what it saves, and its increase of perplexity over that of full depth (0.1: a tenth more)."""

    threshold: float
    saved: Measure
    increase: Measure


@dataclass(frozen=True, slots=True)
class TradeCurve:
    """A variant's thresholds by what they save, ascending. `start` is the increase with exits off."""

    variant: Variant
    skipped_kv: SkippedKV
    axis: Axis
    base: Base
    start: float
    points: tuple[TradePoint, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A curve held against the paper's, as far as both reach.

    It is `below` where every one of our points lies below the paper's line, and every one of the paper's that ours
    reaches lies above our line; `surely` where the upper ends of our points' intervals do too. `compared` counts these
    points, `reached` those of the paper among them. `closest` is the largest ratio of our increase to the paper's,
    over the points that save something (None without any).
    """

    below: bool
    surely: bool
    compared: int
    reached: int
    closest: float | None


@dataclass(frozen=True, slots=True)
class TradeOff:
    """A curve, and what comes of holding it against the paper's."""

    curve: TradeCurve
    comparison: Comparison


def paper_curve() -> tuple[tuple[float, float], ...]:
    """The paper's points: share of compute saved, relative increase of perplexity; first nothing saved at no cost."""
    return ((0.0, 0.0), *((saved, increase / EXITS_PERPLEXITY) for saved, increase in EXITS_TRADE_OFF))


def trade_curves(table: EvaluationTable, variant: Variant) -> tuple[TradeCurve, ...]:
    """The curves of `variant`: by both ways of skipped keys and values, both measures of saving and both bases.

    Net of gates backfill saves nothing but passes, so it has no curve of that.
    """
    results = {result.mode: result for result in (*table.results, *table.sweep)}
    found = []
    for skipped_kv in METHODS:
        own = [
            result
            for mode, result in results.items()
            if mode.variant == variant and mode.skipped_kv == skipped_kv and mode.threshold is not None
        ]
        for axis in AXES if own else ():
            if axis == "net" and skipped_kv == "backfill":
                continue
            for base in BASES:
                start = results[Mode(variant)].perplexity_ratio.value - 1.0 if base == "reference" else 0.0
                points = sorted(_points(own, axis, base), key=lambda point: point.saved.value)
                found.append(TradeCurve(variant, skipped_kv, axis, base, start, tuple(points)))
    return tuple(found)


def trade_offs(table: EvaluationTable, variant: Variant) -> tuple[TradeOff, ...]:
    """The curves of `variant` (see `trade_curves`), each held against the paper's."""
    return tuple(TradeOff(curve, compare(curve)) for curve in trade_curves(table, variant))


def compare(curve: TradeCurve) -> Comparison:
    """`curve` held against the paper's."""
    shares, increases = (np.array(part) for part in zip(*paper_curve(), strict=True))
    points = [
        point
        for point in curve.points
        if point.saved.value <= shares[-1] and (point.saved.value, point.increase.value) != (0.0, 0.0)
    ]  # where nobody leaves there is nothing to compare
    limits = [float(np.interp(point.saved.value, shares, increases)) for point in points]
    pairs = [(point.increase.value, limit) for point, limit in zip(points, limits, strict=True)]
    reached = list(_reached(curve))
    surely = all(point.increase.high < limit for point, limit in zip(points, limits, strict=True))
    every = [*pairs, *reached]
    below = bool(every) and all(ours < theirs for ours, theirs in every)
    return Comparison(
        below=below,
        surely=below and surely,
        compared=len(every),
        reached=len(reached),
        closest=max((ours / theirs for ours, theirs in every if theirs > 0), default=None),
    )


def _points(results: Sequence[ModeResult], axis: Axis, base: Base) -> Iterator[TradePoint]:
    for result in results:
        ratio = result.perplexity_ratio if base == "reference" else result.exits_ratio
        if ratio is not None and result.mode.threshold is not None:
            saved = result.passes_saved if axis == "layers" else result.compute_saved
            increase = Measure(ratio.value - 1.0, ratio.low - 1.0, ratio.high - 1.0)
            yield TradePoint(result.mode.threshold, saved, increase)


def _reached(curve: TradeCurve) -> Iterator[tuple[float, float]]:
    """Our increase and the paper's at the paper's points, where our line goes so far."""
    saving = [point for point in curve.points if point.saved.value > 0]
    shares = [0.0, *(point.saved.value for point in saving)]
    increases = [curve.start, *(point.increase.value for point in saving)]
    for saved, theirs in paper_curve()[1:]:
        if saved <= shares[-1]:
            yield float(np.interp(saved, shares, increases)), theirs
