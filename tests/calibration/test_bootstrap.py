"""Intervals cover what is known to be true as often as they say, few blocks and correlated tokens included."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from exeunt.calibration.bootstrap import (
    Measure,
    block_difference,
    block_ratio,
    block_share,
    identity,
    resamples,
)

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
    assert found.value == 1.5
    assert not found.bounded
    assert found.ends == (1.5, 1.5)
    three = block_ratio(np.array([0.0, 6.0, 0.0]), np.array([0.0, 4.0, 0.0]), resamples(3, 0))
    assert (three.value, three.bounded) == (1.5, False)
    nothing = np.array([4.0])
    assert block_ratio(np.zeros(1), nothing, resamples(1, 0)) == Measure(0.0, 0.0, 0.0)
    assert block_difference(nothing, nothing, np.array([7.0]), resamples(1, 0), np.exp) == Measure(0, 0, 0)


@pytest.mark.parametrize(("rate", "blocks"), [(0.0, 30), (1.0, 30), (0.0, 1), (0.4, 1), (1.0, 1)])
def test_a_share_that_resamples_cannot_vary_has_the_binomial_interval(rate: float, blocks: int) -> None:
    below = np.full(blocks, 10.0)
    found = block_share(rate * below, below, resamples(blocks, 0))
    effective = 10 * blocks / (1 + 9 * 0.1)
    low, high = stats.binomtest(round(rate * effective), round(effective)).proportion_ci()
    assert found.value == rate
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)
    assert found.high - found.low > 0.02
    assert 0 <= found.low <= rate <= found.high <= 1


def test_no_event_in_correlated_blocks_leaves_the_true_share_possible() -> None:
    """Shares of 1 % with ρ = 0.1: where a text shows none, the interval holds 1 % as often as it should."""
    rng, drawn = np.random.default_rng(0), resamples(25, 0)
    below, covered, silent = np.full(25, 12.0), 0, 0
    for _ in range(2000):
        hits = rng.binomial(12, rng.beta(0.09, 8.91, 25)).astype(np.float64)
        found = block_share(hits, below, drawn)
        if hits.sum() == 0:
            silent += 1
            covered += found.low <= 0.01 <= found.high
    assert silent > 50
    assert covered == silent


def test_other_shares_are_ratios() -> None:
    hits, below = correlated(np.random.default_rng(5), 12)
    drawn = resamples(12, 0)
    assert block_share(hits / 3, below, drawn) == block_ratio(hits / 3, below, drawn)


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
