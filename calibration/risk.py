"""When a threshold may be called safe as to disagreement: a test of a ratio on blocks of text.

The risk of a threshold is a ratio: tokens that left and differ from full depth, over tokens that left. Tokens of one
text are dependent, so the unit is a block of text (`exeunt.calibration.text_units`), and blocks are taken as draws from
the text that will be served. The other risk, by how much text becomes less likely, is in `exeunt.calibration.nll_risk`.

*The test.* Bounded-variable tests (Hoeffding, Bentkus, betting) on block sums allow for the worst block, in which every
token leaves wrongly, and so certify nothing at the exit rates that matter. We use the interval that survey
statistics made for proportions from clusters with few positives: Korn and Graubard, Survey Methodology 24 (1998)
193-201. The exact binomial (Clopper-Pearson) bound is applied to the *effective* number of tokens, n / deff, where
the design effect deff is the ratio's linearised between-block variance over its binomial variance, with a correction
for degrees of freedom by Student quantiles. The design effect is never taken below 1, nor below 1 + (m - 1) ρ, with
m the size-weighted mean of exits in a block and ρ the correlation of errors within a block, estimated on other
data: where no error was seen, the between-block variance is zero and says nothing. It is an approximation, and its
coverage is tested by simulation.
"""

from dataclasses import dataclass
from decimal import Decimal
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from exeunt.calibration.fixed_sequence import FixedSequence

Counts = NDArray[np.float64]

CONFIDENCE: Final = 0.95
CAUTION: Final = 2.5
"""Standard errors by which the correlation of errors is taken to be higher than estimated."""
LEAST_BLOCKS: Final = 20
"""Fewer blocks with an exit than this give no idea of the variance between blocks."""
NOTHING_TESTED: Final = "no threshold was strict enough to begin with"


def percent(share: float) -> str:
    """A target as people read it, none of its digits lost: 0.02 is 2%, 0.015 is 1.5%."""
    return f"{100 * share:.12g}%"


@dataclass(frozen=True, slots=True)
class ExitCounts:
    """What was seen at one threshold, block by block: tokens that left, and those of them that differ."""

    exits: Counts  # [blocks]
    errors: Counts  # [blocks], each at most the exits
    tokens: int  # that might have left, in all blocks: all but each row's first

    @property
    def total(self) -> int:
        """Tokens that left, in all blocks."""
        return int(self.exits.sum())

    @property
    def exit_rate(self) -> float:
        """Share that left, of the tokens that might have."""
        return self.total / self.tokens if self.tokens else 0.0

    @property
    def wrong(self) -> int:
        """Tokens that left and differ from full depth."""
        return int(self.errors.sum())

    @property
    def risk(self) -> float | None:
        """Disagreement among the tokens that left; None when none left."""
        return self.wrong / self.total if self.total else None


@dataclass(frozen=True, slots=True)
class Certificate:
    """The outcome for one target. `threshold` is None unless certified; the counts are those of the threshold
    that is certified, or of the one that failed."""

    target: float
    threshold: float | None
    exits: int
    tokens: int
    disagreement: float | None
    upper_bound: float | None
    reason: str | None

    @property
    def certified(self) -> bool:
        """Whether a threshold passed; where not, `reason` says why."""
        return self.threshold is not None


def design_effect(counts: ExitCounts, correlation: float) -> float:
    """Variance of the ratio over that of as many independent tokens: at least 1 and at least 1 + (m - 1) ρ.

    `correlation` is ρ, of errors within a block; m is Σ exits² / Σ exits.
    """
    total, wrong = counts.exits.sum(), counts.errors.sum()
    if total == 0:
        return 1.0
    size = float(np.square(counts.exits).sum() / total)
    least = 1.0 + max(0.0, size - 1.0) * max(0.0, correlation)
    ratio = wrong / total
    if not 0.0 < ratio < 1.0:
        return least
    used = counts.exits > 0
    blocks = int(used.sum())
    if blocks < 2:
        return max(least, size)
    residuals: Counts = counts.errors[used] - ratio * counts.exits[used]
    variance = blocks / (blocks - 1) * float(np.square(residuals).sum()) / total**2
    return max(least, float(variance * total / (ratio * (1.0 - ratio))))


def error_correlation(counts: ExitCounts) -> float:
    """ρ: by how much errors in one unit are more alike than in two, at most, as far as these units can tell; 0 to 1.

    From the design effect, whose estimate from n units has a relative standard error of about √(2/(n − 1)), that of a
    variance: `CAUTION` of them are added. Taken as estimated, few units certify too often.
    """
    total = counts.exits.sum()
    units = int((counts.exits > 0).sum())
    if total == 0 or units < 2:
        return 0.0
    size = float(np.square(counts.exits).sum() / total)
    effect = design_effect(counts, 0.0) * (1.0 + CAUTION * (2.0 / (units - 1)) ** 0.5)
    return min(1.0, (effect - 1.0) / (size - 1.0)) if size > 1.0 else 0.0


def upper_bound(counts: ExitCounts, correlation: float, confidence: float = CONFIDENCE) -> float:
    """The one-sided upper confidence bound of the risk; 1 where too few blocks have an exit to tell."""
    effective = _effective(counts, correlation, confidence)
    if effective is None:
        return 1.0
    tokens, wrong = effective
    return 1.0 if wrong >= tokens else float(special.betaincinv(wrong + 1.0, tokens - wrong, confidence))


def p_value(counts: ExitCounts, target: float, correlation: float, confidence: float = CONFIDENCE) -> float:
    """The chance of so few errors were the risk `target`: P(Binomial(n_eff, target) ≤ errors_eff).

    It is at most 1 - confidence exactly where `upper_bound` is at most `target`.
    """
    effective = _effective(counts, correlation, confidence)
    if effective is None:
        return 1.0
    tokens, wrong = effective
    return 1.0 if wrong >= tokens else float(special.betaincc(wrong + 1.0, tokens - wrong, target))


def _effective(counts: ExitCounts, correlation: float, confidence: float) -> tuple[float, float] | None:
    """Effective (tokens that left, wrong ones); None where there are too few blocks."""
    blocks = int((counts.exits > 0).sum())
    total = float(counts.exits.sum())
    if blocks < LEAST_BLOCKS:
        return None
    many, few = (float(stats.t.ppf(confidence, max(1.0, free))) for free in (total - 1.0, blocks - 1.0))
    shrink = (many / few) ** 2
    tokens = total * min(1.0, shrink / design_effect(counts, correlation))
    return tokens, tokens * float(counts.errors.sum()) / total


def disagreement_sequence(
    target: float, begin: float, correlation: float, confidence: float = CONFIDENCE
) -> FixedSequence[ExitCounts, Certificate]:
    """Learn-then-Test for one target of disagreement, from the threshold `begin` on."""

    def judge(threshold: float, counts: ExitCounts) -> Certificate:
        bound = upper_bound(counts, correlation, confidence)
        passed = bound <= target
        return Certificate(
            target=target,
            threshold=threshold if passed else None,
            exits=counts.total,
            tokens=counts.tokens,
            disagreement=counts.risk,
            upper_bound=bound,
            reason=None if passed else _why(threshold, counts, bound, target, confidence),
        )

    return FixedSequence(begin, judge, Certificate(target, None, 0, 0, None, None, NOTHING_TESTED))


def _why(threshold: float, counts: ExitCounts, bound: float, target: float, confidence: float) -> str:
    blocks = int((counts.exits > 0).sum())
    if blocks < LEAST_BLOCKS:
        return too_few(threshold, counts.total, blocks)
    return (
        f"at threshold {threshold:.3f} {counts.wrong} of the {counts.total} tokens that left differ, so the "
        f"disagreement may be as high as {above(bound, target, 1, '%')} at {confidence:.0%} confidence"
    )


def above(bound: float, target: float, decimals: int, form: Literal["%", "f"]) -> str:
    """`bound` with so many decimals, or as many more as it takes to show that it is above the target, if it is."""
    for more in range(decimals, decimals + 9):
        text = f"{bound:.{more}{form}}"
        shown = Decimal(text.removesuffix("%")) / (100 if form == "%" else 1)
        if shown > Decimal(str(target)) or bound <= target:  # as the target is written, not as floats hold it
            break
    return text


def too_few(threshold: float, exits: int, blocks: int) -> str:
    """That `exits` tokens of `blocks` blocks are not enough to judge a threshold by."""
    return (
        f"at threshold {threshold:.3f} only {exits} tokens in {blocks} blocks of text left, and {LEAST_BLOCKS} blocks "
        "are needed: calibrate with more text (--tokens, or --preset default where it was quick)"
    )


def forecast_p_value(
    seen: ExitCounts, target: float, correlation: float, growth: float, confidence: float = CONFIDENCE
) -> float:
    """The p-value that a split `growth` times as large would give, were its blocks like those in `seen`.

    One error more than seen is assumed: that none was seen does not mean that there are none.
    """
    repeats = max(1, round(growth))
    errors = seen.errors.copy()
    spare = seen.exits > errors
    errors[int(spare.argmax())] += float(spare.any())
    larger = ExitCounts(np.tile(seen.exits, repeats), np.tile(errors, repeats), seen.tokens * repeats)
    return p_value(larger, target, correlation, confidence)
