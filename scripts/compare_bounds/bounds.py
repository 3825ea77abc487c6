"""Tests of "the mean increase is above the target" at level 5 %, all on the same simulated texts.

Each takes draws and a target, and says by text whether it would certify: [texts] bool.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from exeunt.calibration.nll_risk import CLIP, upper_bound
from scripts.compare_bounds.draws import BLOCK, Draws

LEVEL: Final = 0.05
_RESAMPLES: Final = 1000

Verdict = NDArray[np.bool_]


def tokens_alone(draws: Draws, target: float) -> Verdict:
    """The normal test that takes tokens as independent."""
    tokens = draws.sums.shape[1] * BLOCK
    mean = draws.sums.sum(1) / tokens
    spread = np.sqrt((draws.squares.sum(1) / tokens - mean**2) / tokens)
    return np.asarray(stats.norm.cdf((mean - target) / spread) <= LEVEL)


def student(draws: Draws, target: float) -> Verdict:
    """Student's t over blocks."""
    statistic, _, blocks = _studentised(draws, target)
    return np.asarray(stats.t.cdf(statistic, blocks - 1) <= LEVEL)


def johnson(draws: Draws, target: float) -> Verdict:
    """Student's t modified for skewness (Johnson, Journal of the American Statistical Association 73, 1978)."""
    statistic, skewness, blocks = _studentised(draws, target)
    root = np.sqrt(blocks)
    modified = statistic + skewness / (6 * root) + skewness * statistic**2 / (3 * root)
    return np.asarray(stats.t.cdf(modified, blocks - 1) <= LEVEL)


def hall(draws: Draws, target: float) -> Verdict:
    """The same made monotone (Hall, Journal of the Royal Statistical Society B 54, 1992)."""
    statistic, skewness, blocks = _studentised(draws, target)
    root = np.sqrt(blocks)
    moved = statistic + skewness * statistic**2 / (3 * root) + skewness**2 * statistic**3 / (27 * blocks)
    return np.asarray(stats.t.cdf(moved + skewness / (6 * root), blocks - 1) <= LEVEL)


def bootstrap(draws: Draws, target: float) -> Verdict:
    """The studentised bootstrap over blocks (Efron and Tibshirani 1993, chapter 12), one seed."""
    means = draws.sums / BLOCK - target
    blocks = means.shape[1]
    drawn = np.random.default_rng(0).multinomial(blocks, np.full(blocks, 1 / blocks), _RESAMPLES).T / blocks
    mean = means.mean(1)
    resampled = means @ drawn
    spread = np.sqrt(np.maximum(np.square(means) @ drawn - resampled**2, 1e-18))
    quantile = np.quantile((resampled - mean[:, None]) / spread, LEVEL, axis=1)
    return np.asarray(mean - quantile * means.std(1) <= 0)


def bernstein(draws: Draws, target: float) -> Verdict:
    """The empirical Bernstein bound of block means (Maurer and Pontil, arXiv 0907.3740, theorem 4)."""
    means = draws.sums / BLOCK
    blocks, log = means.shape[1], np.log(2 / LEVEL)
    spread = np.sqrt(2 * means.var(1, ddof=1) * log / blocks)
    return np.asarray(means.mean(1) + spread + 2 * CLIP * 7 * log / (3 * (blocks - 1)) <= target)


def betting(draws: Draws, target: float) -> Verdict:
    """A bet against block means above the target (Waudby-Smith and Ramdas, arXiv 2010.09686, section 4)."""
    means = (draws.sums / BLOCK + CLIP) / (2 * CLIP)
    hoped, blocks = (target + CLIP) / (2 * CLIP), means.shape[1]
    seen = np.arange(1, blocks + 1)
    centre = (0.5 + np.cumsum(means, 1)) / (seen + 1)
    variance = (0.25 + np.cumsum(np.square(means - centre), 1)) / (seen + 1)
    before = np.concatenate([np.full((len(means), 1), 0.25), variance[:, :-1]], 1)
    stake = np.minimum(np.sqrt(2 * np.log(1 / LEVEL) / (before * blocks)), 0.9 / (1 - hoped))
    capital = np.cumsum(np.log1p(stake * (hoped - means)), 1).max(1)
    return np.asarray(capital >= np.log(1 / LEVEL))


def kept(draws: Draws, target: float) -> Verdict:
    """What calibration does: Student's t with one block more, as bad as the worst."""
    bounds = (upper_bound(draws.counts(text), 1 - LEVEL) for text in range(len(draws.sums)))
    return np.array([bound is not None and bound <= target for bound in bounds])


BOUNDS: Final[dict[str, Callable[[Draws, float], Verdict]]] = {
    "tokens as independent": tokens_alone,
    "Student": student,
    "Johnson": johnson,
    "Hall": hall,
    "bootstrap-t": bootstrap,
    "Bernstein": bernstein,
    "betting": betting,
    "worst block once more": kept,
}


def _studentised(draws: Draws, target: float) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """The t statistic and the skewness by text, each [texts], and the blocks of a text."""
    means = draws.sums / BLOCK - target
    blocks = means.shape[1]
    mean = means.mean(1)
    skewness = np.power(means - mean[:, None], 3).mean(1) / means.std(1) ** 3
    return mean / means.std(1, ddof=1) * np.sqrt(blocks), skewness, blocks
