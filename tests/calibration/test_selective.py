"""Agreement by coverage, on cases that can be counted by hand and on ones with a known expectation."""

import numpy as np
import pytest

from exeunt.calibration.selective import selective_agreement, share_within


def test_it_is_the_mean_agreement_of_the_surest_tokens() -> None:
    sure = np.array([0.2, 0.9, 0.5, 0.7])
    agrees = np.array([True, True, False, True])
    assert selective_agreement(sure, agrees) == pytest.approx((1 + 1 + 2 / 3 + 3 / 4) / 4)
    assert selective_agreement(np.array([]), np.array([], dtype=bool)) == 0.0


def test_knowing_when_is_worth_something_and_knowing_nothing_gives_plain_agreement() -> None:
    g = np.random.default_rng(0)
    agrees = g.random(20_000) < 0.6
    blind = selective_agreement(g.random(20_000), agrees)
    knowing = selective_agreement(agrees + g.random(20_000), agrees)
    misled = selective_agreement(g.random(20_000) - agrees, agrees)
    assert blind == pytest.approx(0.6, abs=0.02)
    # sorted perfectly, risk is 0 up to 0.6 of the tokens and 1 - 0.6 / c at coverage c behind that
    assert knowing == pytest.approx(0.6 - 0.6 * np.log(0.6), abs=0.01)
    assert misled == pytest.approx(0.6 + 0.4 * np.log(0.4), abs=0.01)


def test_it_rises_with_agreement_and_with_order() -> None:
    sure = np.linspace(1, 0, 10)
    worse = np.array([1, 1, 1, 0, 1, 0, 1, 0, 0, 0], dtype=bool)
    more, sooner = worse.copy(), worse.copy()
    more[7] = True
    sooner[[3, 4]] = sooner[[4, 3]]
    base = selective_agreement(sure, worse)
    assert selective_agreement(sure, more) > base
    assert selective_agreement(sure, sooner) > base


def test_the_share_that_may_leave_is_the_largest_within_the_risk() -> None:
    sure = np.linspace(1, 0, 10)
    agrees = np.array([1, 0, 1, 1, 1, 1, 1, 1, 1, 0], dtype=bool)
    assert share_within(sure, agrees, 0.0) == pytest.approx(0.1)
    assert share_within(sure, agrees, 0.12) == pytest.approx(0.9), "one of nine is wrong"
    assert share_within(sure, agrees, 0.2) == 1.0
    assert share_within(sure, ~agrees, 0.1) == 0.0
