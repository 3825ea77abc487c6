"""Intervals of figures that are ratios of sums over tokens, by resampling blocks of text.

Neighbouring tokens are dependent, so the unit that is drawn is a block of text (Efron 1979; blocks as in Künsch 1989).
Percentile intervals of few blocks are too narrow; theirs are widened to the quantiles at which the interval of a mean
is Student's (the expanded percentile interval: Hesterberg, The American Statistician 2015, arXiv 1411.5279). Whoever
compares forms or modes gives all of them the same resamples, so that what they share cancels in a difference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES: Final = 1000
COVERAGE: Final = 0.95

Floats = NDArray[np.float64]
Shape = Callable[[Floats], Floats]


@dataclass(frozen=True, slots=True)
class Measure:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def resamples(blocks: int, seed: int, count: int = RESAMPLES) -> NDArray[np.int64]:
    """How often each of `blocks` blocks of text is drawn in each of `count` resamples: [count, blocks]."""
    return np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1.0 / blocks), count)


def identity(ratios: Floats) -> Floats:
    """The ratios as they are: the shape of a mean. `numpy.exp` is that of a perplexity."""
    return ratios


def block_ratio(above: Floats, below: Floats, drawn: NDArray[np.int64], shape: Shape = identity) -> Measure:
    """`shape` of Σ above / Σ below, sums over blocks [blocks], with its interval over `drawn` [resamples, blocks].

    Blocks that `below` says nothing of count as not there, and resamples that drew no others are passed over. With a
    single block left the interval is the value alone: nothing is known of its spread. Raises ValueError where none is.
    """
    return block_difference(above, None, below, drawn, shape)


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
    held = drawn @ below
    defined = held > 0

    def estimates(sums: Floats) -> tuple[float, Floats]:
        whole = shape(np.asarray(sums.sum() / below.sum()))
        return float(whole), shape((drawn @ sums)[defined] / held[defined])

    value, resampled = estimates(above)
    if base is not None:
        base_value, base_resampled = estimates(base)
        value, resampled = value - base_value, resampled - base_resampled
    low, high = np.quantile(resampled, [_tail(spoken), 1.0 - _tail(spoken)])
    return Measure(value, float(low), float(high))


def _tail(blocks: int) -> float:
    """The share of resamples left out at each end: Φ(−√(n / (n − 1)) t), t Student's quantile at n − 1 degrees."""
    outside = (1.0 - COVERAGE) / 2
    if blocks < 2:
        return outside
    quantile = stats.t.ppf(outside, blocks - 1)
    return float(stats.norm.cdf(np.sqrt(blocks / (blocks - 1)) * quantile))
