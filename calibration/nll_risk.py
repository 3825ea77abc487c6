"""When a threshold may be called safe as to likelihood: a test of the mean increase of the negative log-likelihood.

The risk of a threshold is, over all tokens of the text that are predicted behind a token that might leave,

    the mean of clip(NLL of the mode - NLL of full depth of the same variant, -B, +B),        in nats per token,

so that exp(target) bounds the ratio of the clipped perplexities. Unclipped, one token that a mode makes a million times
less likely would weigh as much as thousands, and no amount of text would bound what it has not seen; B says what one
token may count at most.

*The test.* The unit is a block of text (`exeunt.calibration.text_units`), D_b the sum of its clipped increases, n_b its
tokens, R = Σ D_b / Σ n_b. Sums over blocks are skewed to the right: a bad block lifts both the mean and the spread, so
where none was drawn both are too small, and Student's bound is too low more often than it says. As Fay and Feuer do
for weighted sums of rare events (*Statistics in Medicine* 16, 1997, 791-801), one block more is counted, as bad as the
worst that was seen: with e_b = D_b - R n_b over these k + 1 blocks and N their tokens,

    bound = R + t(confidence; k - 1) √( (k + 1)/k · Σ e_b² ) / N.

It is an approximation. `python -m scripts.compare_bounds` compares it on correlated, heavy-tailed blocks with Student's
t, Johnson's and Hall's corrections for skewness, the studentised bootstrap, an empirical Bernstein bound and a betting
bound (arXiv 2010.09686); it is the one that keeps to 5 % on average over kinds of text and still certifies. With few
blocks it is no more exact than that: at 25 the worst of fifteen kinds passes in 5.6 % of texts, from 43 on in at most
4.2 %.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy import stats

from exeunt.calibration.bootstrap import Measure
from exeunt.calibration.fixed_sequence import FixedSequence
from exeunt.calibration.risk import CONFIDENCE, LEAST_BLOCKS, NOTHING_TESTED, Counts, above, too_few

CLIP: Final = 3.0
"""B, in nats: a token that a mode makes more than e³ = 20 times less (or more) likely counts as 20 times."""


@dataclass(frozen=True, slots=True)
class NllCounts:
    """What was seen at one threshold, block by block, each [blocks]; sums are in nats.

    `tokens` are those predicted behind a token that might leave, `exits` those of them whose predicting token left.
    """

    clipped: Counts  # Σ of clipped increases
    unclipped: Counts  # Σ of increases as they are
    full: Counts  # Σ of NLL at full depth of the same variant
    exits: Counts
    tokens: Counts

    @property
    def total(self) -> int:
        """Tokens, in all blocks."""
        return int(self.tokens.sum())

    @property
    def left(self) -> int:
        """Tokens that left, in all blocks."""
        return int(self.exits.sum())

    @property
    def exit_rate(self) -> float:
        """Share that left, of the tokens that might have and that another follows."""
        return self.left / self.total if self.total else 0.0

    @property
    def increase(self) -> float:
        """The mean clipped increase, nats per token: the estimate of the risk."""
        return float(self.clipped.sum() / self.tokens.sum()) if self.total else 0.0


@dataclass(frozen=True, slots=True)
class NllCertificate:
    """The outcome for one target, nats per token. `threshold` is None unless certified; the figures are those of the
    threshold that is certified, or of the one that failed.

    `unclipped` is the mean increase without a clip, `perplexity_ratio` its exponential; neither is certified.
    """

    target: float
    threshold: float | None
    exits: int
    tokens: int
    increase: float | None
    upper_bound: float | None
    unclipped: Measure | None
    perplexity: float | None  # of the mode, unclipped
    full_perplexity: float | None  # of full depth of the same variant
    reason: str | None

    @property
    def certified(self) -> bool:
        """Whether a threshold passed; where not, `reason` says why."""
        return self.threshold is not None

    @property
    def perplexity_ratio(self) -> Measure | None:
        """Perplexity over that of full depth, unclipped: not certified."""
        if self.unclipped is None:
            return None
        value, low, high = np.exp([self.unclipped.value, self.unclipped.low, self.unclipped.high])
        return Measure(float(value), float(low), float(high))


def upper_bound(counts: NllCounts, confidence: float = CONFIDENCE) -> float | None:
    """The one-sided upper confidence bound of the risk, nats per token; None where too few blocks have an exit."""
    if int((counts.exits > 0).sum()) < LEAST_BLOCKS:
        return None
    used = counts.tokens > 0
    sums, tokens = counts.clipped[used], counts.tokens[used]
    blocks = len(sums)
    worst = int(np.argmax(sums - sums.sum() / tokens.sum() * tokens))
    sums, tokens = np.append(sums, sums[worst]), np.append(tokens, tokens[worst])
    mean = sums.sum() / tokens.sum()
    residuals = sums - mean * tokens
    spread = np.sqrt((blocks + 1) / blocks * np.square(residuals).sum()) / tokens.sum()
    return float(mean + stats.t.ppf(confidence, blocks - 1) * spread)


def forecast_bound(seen: NllCounts, growth: float, confidence: float = CONFIDENCE) -> float | None:
    """The bound that a split `growth` times as large would give, were its blocks like those in `seen`."""
    repeats = max(1, round(growth))
    larger = (
        np.tile(each, repeats) for each in (seen.clipped, seen.unclipped, seen.full, seen.exits, seen.tokens)
    )
    return upper_bound(NllCounts(*larger), confidence)


def interval(counts: NllCounts, confidence: float = CONFIDENCE) -> Measure | None:
    """The mean increase without a clip, nats per token, with Student's interval over blocks; None below two blocks."""
    used = counts.tokens > 0
    sums, tokens = counts.unclipped[used], counts.tokens[used]
    blocks = len(sums)
    if blocks < 2:
        return None
    mean = float(sums.sum() / tokens.sum())
    spread = np.sqrt(blocks / (blocks - 1) * np.square(sums - mean * tokens).sum()) / tokens.sum()
    away = float(stats.t.ppf((1.0 + confidence) / 2, blocks - 1) * spread)
    return Measure(mean, mean - away, mean + away)


def nll_sequence(
    target: float, begin: float, confidence: float = CONFIDENCE
) -> FixedSequence[NllCounts, NllCertificate]:
    """Learn-then-Test for one target of the mean NLL increase, nats per token, from the threshold `begin` on."""

    def judge(threshold: float, counts: NllCounts) -> NllCertificate:
        bound = upper_bound(counts, confidence)
        passed = bound is not None and bound <= target
        full = float(counts.full.sum() / counts.total) if counts.total else None
        shift = interval(counts)
        return NllCertificate(
            target=target,
            threshold=threshold if passed else None,
            exits=counts.left,
            tokens=counts.total,
            increase=counts.increase,
            upper_bound=bound,
            unclipped=shift,
            perplexity=None if full is None or shift is None else float(np.exp(full + shift.value)),
            full_perplexity=None if full is None else float(np.exp(full)),
            reason=None if passed else _why(threshold, counts, bound, target, confidence),
        )

    return FixedSequence(begin, judge, untested(target, NOTHING_TESTED))


def untested(target: float, reason: str) -> NllCertificate:
    """The outcome for a target that no threshold was tested for."""
    return NllCertificate(target, None, 0, 0, None, None, None, None, None, reason)


def _why(threshold: float, counts: NllCounts, bound: float | None, target: float, confidence: float) -> str:
    if bound is None:
        return too_few(threshold, counts.left, int((counts.exits > 0).sum()))
    return (
        f"at threshold {threshold:.3f}, where {counts.left} of {counts.total} tokens left, the mean increase of "
        f"{counts.increase:.4f} nats may be as high as {above(bound, target, 4, 'f')} at {confidence:.0%} "
        "confidence"
    )
