"""ROC, reliability and risk by coverage of scores whose figures are known."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from exeunt.calibration.gate_quality import CURVE_POINTS, auc, coverage, gate_quality, roc


def area(curve: tuple[tuple[float, float], ...]) -> float:
    x, y = np.array(curve).T
    return float(np.trapezoid(y, x))


def gaussian(tokens: int, apart: float, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores of agreeing tokens are normal around `apart`, of others around 0."""
    g = np.random.default_rng(seed)
    truth = g.random(tokens) < 0.6
    return g.normal(size=tokens) + apart * truth, truth


def test_the_roc_of_normal_scores_is_the_binormal_one() -> None:
    score, truth = gaussian(200_000, 1.2)
    curve = roc(score, truth)
    assert len(curve) == CURVE_POINTS
    assert curve[0] == (0.0, 0.0)
    assert curve[-1] == (1.0, 1.0)
    for false, true in curve[1:-1]:
        assert true == pytest.approx(stats.norm.cdf(1.2 + stats.norm.ppf(false)), abs=0.006)
    assert auc(score, truth) == pytest.approx(stats.norm.cdf(1.2 / np.sqrt(2)), abs=0.003)


@pytest.mark.parametrize("tokens", [3, 60, 101, 5_000])
@pytest.mark.parametrize("digits", [1, 8])
def test_the_area_below_the_curve_is_the_auc(tokens: int, digits: int) -> None:
    for seed in range(8):
        score, truth = gaussian(tokens, 1.0, seed)
        score = score.round(digits)  # ties
        curve = roc(score, truth)
        if not 0 < truth.sum() < tokens:
            assert curve == ()
            continue
        assert len(curve) <= CURVE_POINTS
        thinned = len(np.unique(score)) > CURVE_POINTS
        assert area(curve) == pytest.approx(auc(score, truth), abs=1e-3 if thinned else 1e-5)


def test_a_perfect_a_useless_and_a_contrary_score() -> None:
    truth = np.array([True, True, False, False])
    assert roc(np.array([4.0, 3.0, 2.0, 1.0]), truth)[2] == (0.0, 1.0)
    assert roc(np.array([1.0, 1.0, 1.0, 1.0]), truth) == ((0.0, 0.0), (1.0, 1.0))
    assert auc(np.array([1.0, 2.0, 3.0, 4.0]), truth) == 0.0
    assert auc(np.ones(3), np.array([True] * 3)) == 0.5
    assert roc(np.ones(3), np.array([True] * 3)) == ()


def test_coverage_tells_how_often_the_surest_are_wrong() -> None:
    score = np.array([0.9, 0.8, 0.8, 0.1])
    truth = np.array([True, True, False, False])
    assert np.array(coverage(score, truth)) == pytest.approx(
        np.array([(0.25, 0.0), (0.75, 1 / 3), (1.0, 0.5)]), abs=1e-6
    )
    score, truth = gaussian(30_000, 1.5)
    curve = coverage(score, truth)
    assert len(curve) == CURVE_POINTS
    assert curve[-1][0] == 1.0
    assert curve[-1][1] == pytest.approx(float(1 - truth.mean()), abs=1e-6)
    for share, wrong in curve[::10]:
        surest = np.argsort(-score)[: round(share * 30_000)]
        assert wrong == pytest.approx(float(1 - truth[surest].mean()), abs=1e-6)
    assert coverage(np.zeros(0), np.zeros(0, bool)) == ()


def test_confidence_that_is_true_lies_on_the_diagonal_and_boasting_below_it() -> None:
    g = torch.Generator().manual_seed(0)
    honest = torch.rand(40_000, generator=g)
    agrees = torch.rand(40_000, generator=g) < honest
    quality = gate_quality(honest, honest, honest, agrees)
    assert quality.calibration_error < 0.01
    assert len(quality.reliability) == 10
    assert all(abs(said - was) < 0.04 for said, was, _ in quality.reliability)
    assert quality.tokens == sum(tokens for _, _, tokens in quality.reliability) == 40_000
    boasting = gate_quality(honest.sqrt(), honest, honest, agrees)
    assert boasting.calibration_error > 0.1
    assert boasting.auc == pytest.approx(quality.auc), "the order is the same"
    for curve, other in ((boasting.roc, quality.roc), (boasting.coverage, quality.coverage)):
        assert np.array(curve) == pytest.approx(np.array(other), abs=1e-3)
