"""Intervals cover what is known to be true as often as they say, few blocks and correlated tokens included."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from exeunt.calibration.bootstrap import Measure, block_difference, block_ratio, identity, resamples

TRIALS = 400


def correlated(rng: np.random.Generator, blocks: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums and counts of blocks whose tokens share a level: mean 1.5 a token, counts that differ."""
    counts = rng.integers(40, 61, blocks).astype(np.float64)
    level = rng.normal(1.5, 0.4, blocks)
    return level * counts + rng.normal(0.0, np.sqrt(counts)), counts


@pytest.mark.parametrize("blocks", [8, 16, 60])
@pytest.mark.parametrize(("shape", "truth"), [(identity, 1.5), (np.exp, np.exp(1.5))])
def test_a_ratio_is_covered_as_often_as_stated(
    blocks: int, shape: Callable[[NDArray[np.float64]], NDArray[np.float64]], truth: float
) -> None:
    rng = np.random.default_rng(blocks)
    drawn, covered = resamples(blocks, 0), 0
    for _ in range(TRIALS):
        above, below = correlated(rng, blocks)
        found = block_ratio(above, below, drawn, shape)
        covered += found.low <= truth <= found.high
    # 95 % of 400 is known to ± 2.1 points; plain percentiles of eight blocks cover 88 %
    assert 0.92 <= covered / TRIALS <= 0.985


def test_a_difference_is_covered_and_what_both_share_cancels() -> None:
    rng = np.random.default_rng(1)
    drawn, covered, widths = resamples(16, 0), 0, []
    for _ in range(TRIALS):
        base, below = correlated(rng, 16)
        above = base + 0.05 * below + rng.normal(0.0, 1.0, 16)
        found = block_difference(above, base, below, drawn)
        covered += found.low <= 0.05 <= found.high
        widths.append((found.high - found.low) / (block_ratio(above, below, drawn).high - found.value))
    assert 0.92 <= covered / TRIALS <= 0.985
    assert np.median(widths) < 0.05, "the level of a block is the same in both and must not widen it"


def test_nothing_differs_from_itself() -> None:
    above, below = correlated(np.random.default_rng(2), 16)
    drawn = resamples(16, 0)
    assert block_difference(above, above, below, drawn, np.exp) == Measure(0.0, 0.0, 0.0)
    assert block_difference(above, np.zeros(16), below, drawn) == block_ratio(above, below, drawn)


def test_a_single_block_says_nothing_of_its_spread() -> None:
    found = block_ratio(np.array([6.0]), np.array([4.0]), resamples(1, 0))
    assert found == Measure(1.5, 1.5, 1.5)


def test_blocks_without_tokens_are_not_there() -> None:
    """A figure that a few blocks speak of has the interval of a text of these blocks alone."""
    rng = np.random.default_rng(3)
    covered = 0
    drawn = resamples(40, 0)
    for _ in range(TRIALS):
        above, below = correlated(rng, 40)
        silent = np.arange(40) % 5 > 0
        above[silent] = below[silent] = 0.0
        found = block_ratio(above, below, drawn)
        covered += found.low <= 1.5 <= found.high
        assert found.low > 0.5, "a resample without a token must not count as an average of nothing"
    assert 0.90 <= covered / TRIALS <= 0.985
    with pytest.raises(ValueError, match="nothing to average"):
        block_ratio(np.zeros(40), np.zeros(40), drawn)


def test_the_same_seed_draws_the_same_blocks() -> None:
    assert np.array_equal(resamples(9, 4, 20), resamples(9, 4, 20))
    assert not np.array_equal(resamples(9, 4, 20), resamples(9, 5, 20))
    assert (resamples(9, 4, 20).sum(1) == 9).all()
