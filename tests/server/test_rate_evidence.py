"""The bounds of a rate hold at all times at once, for independent, drifting and dependent observations."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from exeunt.server.rate_evidence import RateEvidence, log_capital

ENOUGH = math.log(20)  # at a confidence of 95 %


@pytest.mark.parametrize("rate", [0.01, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("above", [True, False])
def test_false_alarms_of_independent_observations_are_rare(rate: float, above: bool) -> None:
    """The exact chance that the bound is ever wrong within so many looks, one after each observation."""
    looks = 1500
    alive = np.zeros(looks + 2)  # probability of each count of positives with no false alarm so far
    alive[0] = 1.0
    counts = np.arange(looks + 2)
    alarms = 0.0
    for tokens in range(1, looks + 1):
        alive[1:] = alive[1:] * (1 - rate) + alive[:-1] * rate
        alive[0] *= 1 - rate
        wrong = (counts <= tokens) & (log_capital(counts, tokens, rate, above=above) > ENOUGH)
        alarms += alive[wrong].sum()
        alive[wrong] = 0.0
    assert alarms + alive.sum() == pytest.approx(1.0)
    assert 0.002 < alarms <= 0.05  # and not for want of trying


@pytest.mark.parametrize("above", [True, False])
def test_coverage_of_rates_that_drift_and_of_bursts(above: bool) -> None:
    """The bound is of the mean of the rates so far, each given what went before: simulated, looked at every time."""
    g = np.random.default_rng(5)
    runs, looks = 400, 1200
    hits, mean = np.zeros(runs), np.zeros(runs)
    last = np.zeros(runs, dtype=bool)
    broken = np.zeros(runs, dtype=bool)
    for t in range(1, looks + 1):
        drifting = 0.02 * (1 + math.sin(t / 60))
        rate = np.where(last, 0.4, drifting)  # after an error another is likely, as in a hard passage
        mean += (rate - mean) / t
        last = g.random(runs) < rate
        hits += last
        broken |= log_capital(hits, t, mean, above=above) > ENOUGH
    assert broken.mean() <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)


@settings(deadline=None)
@given(st.integers(1, 3000), st.floats(0, 1))
def test_never_tighter_than_the_exact_bound_of_one_look(tokens: int, share: float) -> None:
    """Clopper and Pearson's is the tightest for a number of observations that is fixed beforehand."""
    hits = round(share * tokens)
    evidence = RateEvidence(tokens, hits)
    exact_low = stats.beta.ppf(0.05, hits, tokens - hits + 1) if hits else 0.0
    exact_high = stats.beta.ppf(0.95, hits + 1, tokens - hits) if hits < tokens else 1.0
    assert evidence.lower() <= exact_low + 1e-5
    assert evidence.upper() >= exact_high - 1e-5


@settings(deadline=None)
@given(st.integers(0, 5000), st.integers(0, 5000), st.floats(0.0, 1.0))
def test_bounds_agree_with_the_yes_or_no_questions(hits: int, misses: int, rate: float) -> None:
    evidence = RateEvidence(hits + misses, hits)
    low, high = evidence.lower(), evidence.upper()
    assert 0.0 <= low <= high <= 1.0
    if abs(rate - low) > 2e-6:
        assert evidence.exceeds(rate) == (rate < low)
    if abs(rate - high) > 2e-6:
        assert evidence.stays_below(rate) == (rate > high)


def test_nothing_seen_says_nothing() -> None:
    assert (RateEvidence().lower(), RateEvidence().upper()) == (0.0, 1.0)


@pytest.mark.parametrize(("rate", "within"), [(0.04, 2500), (0.1, 300), (0.5, 40)])
def test_a_rate_above_the_target_is_found_soon(rate: float, within: int) -> None:
    """Nine runs in ten see that the rate is above 0.02 within so many observations."""
    found = 0
    for seed in range(60):
        dice, evidence = random.Random(seed), RateEvidence()
        for _ in range(within):
            evidence.add(hit=dice.random() < rate)
            if evidence.exceeds(0.02):
                found += 1
                break
    assert found >= 54


def test_bounds_close_in_on_the_rate() -> None:
    evidence = RateEvidence(100_000, 5_000)
    assert 0.046 < evidence.lower() < 0.05 < evidence.upper() < 0.054
