"""Which thresholds are worth testing: planned on the select split, for `exeunt.calibration.certification`.

Planning looks at the gates' decisions over full-depth states, which costs no pass: for each target it begins at the
threshold that looks most likely to pass, and goes on to the loosest that looks safe.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exeunt.calibration.exit_training import Labelled
from exeunt.calibration.risk import CONFIDENCE, ExitCounts, error_correlation, forecast_p_value
from exeunt.calibration.teacher_forcing import LEAST_LOGIT_ROWS, logit_rows
from exeunt.calibration.text_units import text_units
from exeunt.compression.exits import ExitHead

FORECASTS: Final = 60  # thresholds looked at while planning
LEAST_SHARE: Final = 0.004  # of tokens leaving, at the strictest of them
STEPS: Final = (0.8, 0.93)
"""Exit shares tried for a target after the first, over the largest share that looks safe for it while planning."""
SAME: Final = 0.9  # thresholds whose exit shares are closer than this ratio are one

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Steps:
    """Thresholds to test, descending, and by target the one that its sequence begins at."""

    thresholds: tuple[float, ...]
    begins: dict[float, float]


@dataclass(frozen=True, slots=True)
class NllPlan:
    """What to test for the NLL increase: where keys and values are backfilled, and the few passes for propagate."""

    backfill: Steps
    propagate: Steps


@dataclass(frozen=True, slots=True)
class ThresholdPlan:
    """Thresholds to test, strict to loose, where each target's sequence begins, and what planning saw."""

    thresholds: tuple[float, ...]  # descending
    begins: dict[float, float]  # by target
    correlation: float  # ρ of errors within a block of text
    nll: NllPlan | None = None  # of the other risk; None where it has no targets

    @property
    def least(self) -> float:
        """The loosest threshold of all that may be tested; 1 where there is none."""
        nll = () if self.nll is None else (*self.nll.backfill.thresholds, *self.nll.propagate.thresholds)
        return min((*self.thresholds, *nll), default=1.0)


@dataclass(frozen=True, slots=True)
class GateShares:
    """What gates do per token that might leave, at one threshold: several exits may ask about the same token."""

    threshold: float
    asked: float
    looked: float
    whole: float  # projected onto the whole vocabulary
    left: float


@dataclass(frozen=True, slots=True)
class GateView:
    """What the gates made of full-depth tokens: [exits, T] arrays, and which block of text each is in.

    A token leaves at the first exit whose `reach` is at least the threshold; it is looked at where `looked` is, and
    projected onto the whole vocabulary where `whole` is.
    """

    reach: NDArray[np.float64]
    looked: NDArray[np.float64]
    whole: NDArray[np.float64]
    agrees: NDArray[np.bool_]
    text_block: NDArray[np.int64]  # [T]
    blocks: int

    @property
    def may_leave(self) -> NDArray[np.bool_]:
        """The tokens that might leave, all but each row's first: what exit rates are shares of. [T]"""
        asked: NDArray[np.bool_] = self.reach[0] >= 0
        return asked

    @property
    def best(self) -> NDArray[np.float64]:
        """The largest threshold at which each token that might leave does."""
        best: NDArray[np.float64] = self.reach.max(0)[self.may_leave]
        return best

    def only(self, exits: Sequence[int]) -> "GateView":
        """The view of some of the exits, by their place in it."""
        chosen = list(exits)
        return GateView(
            self.reach[chosen],
            self.looked[chosen],
            self.whole[chosen],
            self.agrees[chosen],
            self.text_block,
            self.blocks,
        )

    def leave_at(self, threshold: float) -> NDArray[np.int64]:
        """The exit at which each token leaves, the number of exits for a token that stays: [T]."""
        leaves = self.reach >= threshold
        return np.where(leaves.any(0), leaves.argmax(0), len(self.reach))

    def shares(self, threshold: float) -> GateShares:
        """How many gates are asked about a token at `threshold`, look at it, project it, and let it go."""
        exits = np.where(self.may_leave, self.leave_at(threshold), -1)
        asked = np.arange(len(self.reach))[:, None] <= exits
        tokens = max(1, int(self.may_leave.sum()))
        return GateShares(
            threshold,
            asked=int(asked.sum()) / tokens,
            looked=int((asked & (self.looked >= threshold)).sum()) / tokens,
            whole=int((asked & (self.whole >= threshold)).sum()) / tokens,
            left=int(((exits >= 0) & (exits < len(self.reach))).sum()) / tokens,
        )

    def counts(self, threshold: float) -> ExitCounts:
        """Exits and errors by block of text at `threshold`, as if exits did not change later tokens."""
        exits = self.leave_at(threshold)
        left = exits < len(self.reach)
        at = np.minimum(exits, len(self.reach) - 1)
        wrong = left & ~self.agrees[at, np.arange(self.agrees.shape[1])]
        return ExitCounts(
            np.bincount(self.text_block[left], minlength=self.blocks).astype(np.float64),
            np.bincount(self.text_block[wrong], minlength=self.blocks).astype(np.float64),
            int(self.may_leave.sum()),
        )


@torch.inference_mode()
def view_gates(
    exits: Sequence[ExitHead],
    states: Sequence[Labelled],
    rows: Sequence[Tensor],
    project: Callable[[Tensor], Tensor],
    advance: Advance = lambda _tokens: None,
    chunk: int = 2048,
    documents: Sequence[int] | None = None,
) -> GateView:
    """The gates' view of the tokens of `rows`, from full-depth `states` behind each exit's block.

    `advance` is told every exit's tokens. `documents` numbers the document that each row was cut from.
    """
    seen = []
    for head, data in zip(exits, states, strict=True):
        parts = []
        for start in range(0, data.tokens, chunk):
            part = data.rows(slice(start, start + chunk), head.adapter.device)
            parts.append(gate_reach(head, part, project))
            advance(part.tokens)
        seen.append([torch.cat(of_all).double().cpu().numpy() for of_all in zip(*parts, strict=True)])
    reach, looked, whole, agrees = (np.stack(of_all) for of_all in zip(*seen, strict=True))
    return view_of(reach, looked, whole, agrees.astype(bool), rows, documents)


def view_of(
    reach: NDArray[np.float64],
    looked: NDArray[np.float64],
    whole: NDArray[np.float64],
    agrees: NDArray[np.bool_],
    rows: Sequence[Tensor],
    documents: Sequence[int] | None = None,
) -> GateView:
    """The view of what gates made of the tokens of `rows`; a row's first token stands for the prompt and stays.

    Its blocks of text are the units of certificates, `text_units`, by the `documents` that rows were cut from.
    """
    starts = np.concatenate([np.arange(len(row)) == 0 for row in rows])
    units = text_units(rows, documents)
    return GateView(np.where(starts, -1.0, reach), looked, whole, agrees, units.where, units.count)


class Reach(NamedTuple):
    """The largest thresholds at which each of T tokens gets past the steps of a gate, and whether leaving is right."""

    leaves: Tensor  # [T] float32
    looked: Tensor  # [T] float32, past the probe
    whole: Tensor  # [T] float32, where it is projected onto the whole vocabulary
    agrees: Tensor  # [T] bool


def gate_reach(
    head: ExitHead, data: Labelled, project: Callable[[Tensor], Tensor], least: float = 0.0
) -> Reach:
    """How far each token of `data` gets in a gate.

    A token leaves at a threshold that each step of the gate lets it pass, so at those up to the least of what these
    say over the share of the threshold that they ask for: min(probe / screen_ratio, confidence), and with a
    confirmation min(probe / screen_ratio, confidence by the shortlist / list_ratio, confidence by all logits).

    `project` gives logits of the whole vocabulary, of which those of the head's shortlist decide; of no more rows at
    once than `logit_rows` allows. Tokens that leave at no threshold from `least` on are not looked at: they have any
    lower reach, and no agreement.
    """
    reading = head.inspect(data.hidden)
    screened = past(reading.probe_logit.sigmoid(), head.screen_ratio)
    reach, whole = screened.clone(), screened.clone()
    agrees = torch.zeros_like(screened, dtype=torch.bool)
    asked = (screened >= least).nonzero().squeeze(1)
    start, rows = 0, LEAST_LOGIT_ROWS  # until the first logits show how many a row has
    while start < len(asked):
        part = asked[start : start + rows]
        seen = reading.rows(part)
        logits = project(seen.state).float()
        sure, confirmation = head.confidence(seen, head.decisive(logits).contiguous()), head.confirmation
        reach[part] = torch.minimum(sure, screened[part])
        if confirmation is not None:
            whole[part] = torch.minimum(past(sure, confirmation.list_ratio), screened[part])
            reach[part] = torch.minimum(head.confirmed(seen, logits), whole[part])
        elif head.shortlist is not None:
            whole[part] = reach[part]
        agrees[part] = logits.argmax(-1) == data.top[part]
        start, rows = start + rows, logit_rows(logits.shape[1], logits.device)
    return Reach(reach, screened, whole, agrees)


def past(sure: Tensor, ratio: float) -> Tensor:
    """The largest thresholds [T] of which the share `ratio` is no more than `sure` [T]; 1 where it may be any."""
    return sure / ratio if ratio > 0 else torch.ones_like(sure)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the select split lets one expect of thresholds on the held-out one."""

    thresholds: tuple[float, ...]  # descending
    counts: tuple[ExitCounts, ...]  # on the select split, by threshold
    correlation: float
    growth: float  # tokens of the held-out split over those of the select split
    confidence: float

    def safe(self, target: float) -> list[int]:
        """The thresholds, by their place, that look as if they would pass for `target`."""
        return [i for i, chance in enumerate(self._chances(target)) if chance <= 1.0 - self.confidence]

    def shares(self, target: float) -> tuple[float, float]:
        """The exit rate at which `target` is likeliest to pass, and the largest that looks safe (0: none does)."""
        chances, safe = self._chances(target), self.safe(target)
        return self.counts[int(np.argmin(chances))].exit_rate, self.counts[
            safe[-1]
        ].exit_rate if safe else 0.0

    def _chances(self, target: float) -> list[float]:
        return [
            forecast_p_value(counts, target, self.correlation, self.growth, self.confidence)
            for counts in self.counts
        ]


def forecast_of(view: GateView, certify_tokens: int, confidence: float) -> Forecast:
    """The forecast for a held-out split of `certify_tokens` tokens."""
    shares = np.geomspace(0.95, LEAST_SHARE, FORECASTS)
    grid = np.unique(np.quantile(view.best, 1.0 - shares).clip(1e-6, 1.0 - 1e-6))[::-1]
    seen = tuple(view.counts(float(threshold)) for threshold in grid)
    correlation = error_correlation(max(seen, key=lambda counts: counts.wrong))
    growth = certify_tokens / view.reach.shape[1]
    return Forecast(tuple(float(each) for each in grid), seen, correlation, growth, confidence)


def plan_thresholds(
    view: GateView, targets: Sequence[float], certify_tokens: int, confidence: float = CONFIDENCE
) -> ThresholdPlan:
    """Thresholds to test for `targets` on a held-out split of `certify_tokens` tokens."""
    forecast = forecast_of(view, certify_tokens, confidence)
    wanted: list[float] = []  # exit shares
    begin_share: dict[float, float] = {}
    for target in targets:
        begin, loosest = forecast.shares(target)
        begin_share[target] = begin
        wanted += [begin, *(step * loosest for step in STEPS if step * loosest > begin)]
    distinct = distinct_shares(wanted)
    thresholds = [threshold_at(view.best, share) for share in distinct]
    begins = {
        target: thresholds[max(i for i, kept in enumerate(distinct) if kept <= share)]
        for target, share in begin_share.items()
    }
    return ThresholdPlan(tuple(dict.fromkeys(thresholds)), begins, forecast.correlation)


def distinct_shares(shares: Sequence[float], same: float = SAME) -> list[float]:
    """`shares` ascending, those left out of which the one before is at least the share `same`."""
    kept: list[float] = []
    for share in sorted(shares):
        if not kept or share * same > kept[-1]:
            kept.append(share)
    return kept


def threshold_at(best: NDArray[np.float64], share: float) -> float:
    """The threshold at which `share` of the tokens leave, with four digits, rounded to the strict side."""
    value = float(np.quantile(best, 1.0 - min(share, 1.0)))
    return float(min(0.9999, max(0.0001, np.ceil(value * 1e4) / 1e4)))
