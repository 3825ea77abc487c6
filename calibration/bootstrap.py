"""Intervals of figures that are ratios of sums over tokens, by resampling blocks of text.

Neighbouring tokens are dependent, so the unit that is drawn is a block of text (Efron 1979; blocks as in Künsch 1989).
Percentile intervals of few blocks are too narrow; theirs are widened to the quantiles at which the interval of a mean
is Student's (the expanded percentile interval: Hesterberg, The American Statistician 2015, arXiv 1411.5279). Whoever
compares forms or modes gives all of them the same resamples, so that what they share cancels in a difference.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES: Final = 1000
COVERAGE: Final = 0.95
CORRELATION: Final = 0.1
"""Of what becomes of two tokens of one block, where it cannot be estimated: as much as is seen in texts."""

Floats = NDArray[np.float64]
Shape = Callable[[Floats], Floats]


@dataclass(frozen=True, slots=True)
class Measure:
    """An estimate with its 95 % interval; the ends are NaN where the text tells nothing of its spread."""

    value: float
    low: float
    high: float

    @property
    def bounded(self) -> bool:
        """Whether there is an interval: not of a mean over one block of text."""
        return not math.isnan(self.low)

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of the interval, the value for both where there is none: what a picture shows."""
        return (self.low, self.high) if self.bounded else (self.value, self.value)


def resamples(blocks: int, seed: int, count: int = RESAMPLES) -> NDArray[np.int64]:
    """How often each of `blocks` blocks of text is drawn in each of `count` resamples: [count, blocks]."""
    return np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1.0 / blocks), count)


def identity(ratios: Floats) -> Floats:
    """The ratios as they are: the shape of a mean. `numpy.exp` is that of a perplexity."""
    return ratios


def block_ratio(above: Floats, below: Floats, drawn: NDArray[np.int64], shape: Shape = identity) -> Measure:
    """`shape` of Σ above / Σ below, sums over blocks [blocks], with its interval over `drawn` [resamples, blocks].

    Blocks that `below` says nothing of count as not there, and resamples that drew no others are passed over. With a
    single block left there is no interval, unless nothing differs at all: `above` is zero, or `below`. Raises
    ValueError where no block is left.
    """
    return block_difference(above, None, below, drawn, shape)


def block_share(hits: Floats, below: Floats, drawn: NDArray[np.int64]) -> Measure:
    """A share of tokens, Σ hits / Σ below over blocks [blocks], with its interval, as `block_ratio`.

    Resamples of a text in which none was a hit, or all were, are all alike, which does not make the share certain; nor
    does a single block. The interval is then Clopper's and Pearson's (*Biometrika* 26, 1934) at the effective number of
    tokens, those of one block taken to be correlated by `CORRELATION`.
    """
    tokens, found = float(below.sum()), float(hits.sum())
    if tokens > 0 and (np.count_nonzero(below) < 2 or found in (0.0, tokens)):
        effective = tokens / max(1.0, 1.0 + (float(np.square(below).sum()) / tokens - 1.0) * CORRELATION)
        share, outside = found / tokens, (1.0 - COVERAGE) / 2
        low = stats.beta.ppf(outside, share * effective, (1 - share) * effective + 1) if found else 0.0
        high = (
            stats.beta.ppf(1 - outside, share * effective + 1, (1 - share) * effective)
            if found < tokens
            else 1.0
        )
        return Measure(share, float(low), float(high))
    return block_ratio(hits, below, drawn)


def block_difference(
    above: Floats,
    base: Floats | None,
    below: Floats,
    drawn: NDArray[np.int64],
    shape: Shape = identity,
) -> Measure:
    """`shape` of Σ above / Σ below less that of Σ base / Σ below on the same resamples, as `block_ratio`."""
    spoken = int(np.count_nonzero(below))
    if spoken == 0:
        raise ValueError("an average was asked for over blocks of text that hold nothing to average")
    exact = np.array_equal(above, np.zeros_like(above) if base is None else base) or (
        base is None and np.array_equal(above, below)
    )
    held = drawn @ below
    defined = held > 0

    def estimates(sums: Floats) -> tuple[float, Floats]:
        whole = shape(np.asarray(sums.sum() / below.sum()))
        return float(whole), shape((drawn @ sums)[defined] / held[defined])

    value, resampled = estimates(above)
    if base is not None:
        base_value, base_resampled = estimates(base)
        value, resampled = value - base_value, resampled - base_resampled
    if spoken == 1 and not exact:
        return Measure(value, math.nan, math.nan)
    low, high = np.quantile(resampled, [_tail(spoken), 1.0 - _tail(spoken)])
    return Measure(value, float(low), float(high))


def _tail(blocks: int) -> float:
    """The share of resamples left out at each end: Φ(−√(n / (n − 1)) t), t Student's quantile at n − 1 degrees."""
    outside = (1.0 - COVERAGE) / 2
    if blocks < 2:
        return outside
    quantile = stats.t.ppf(outside, blocks - 1)
    return float(stats.norm.cdf(np.sqrt(blocks / (blocks - 1)) * quantile))
