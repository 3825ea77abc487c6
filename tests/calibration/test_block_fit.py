"""The ridge map: it finds what was planted and equals the closed forms."""

import pytest
import torch

from exeunt.calibration.block_fit import (
    Moments,
    choose_ridge,
    fit_ridge,
    ridge_map,
)
from tests.calibration.planted import H, data, moments


def test_a_planted_map_is_found() -> None:
    x, y, weight, _ = data(500)
    seen = moments(x, y)
    fit = choose_ridge(seen, moments(*data(200, seed=1)[:2]))
    torch.testing.assert_close(fit.weight, weight, atol=1e-3, rtol=1e-3)
    assert seen.r2(fit.weight, fit.bias) == pytest.approx(1.0, abs=1e-6)


def test_ridge_equals_the_closed_form_on_centred_data() -> None:
    x, y, _, _ = data(300, noise=2.0)
    penalty = 0.7
    xc, yc = x - x.mean(0), y - y.mean(0)
    wanted = torch.linalg.solve(
        xc.T @ xc / 300 + penalty * torch.eye(H, dtype=torch.float64), xc.T @ yc / 300
    ).T
    fit = fit_ridge(moments(x, y), penalty)
    torch.testing.assert_close(fit.weight, wanted)
    torch.testing.assert_close(fit.bias, y.mean(0) - wanted @ x.mean(0))


def test_ridge_without_a_constant_equals_the_closed_form() -> None:
    x, y, _, _ = data(300, noise=2.0)
    gram = x.T @ x / 300
    penalty = 0.01 * gram.diagonal().mean()
    wanted = torch.linalg.solve(gram + penalty * torch.eye(H, dtype=torch.float64), x.T @ y / 300).T
    torch.testing.assert_close(ridge_map(moments(x, y), 0.01), wanted)


def test_error_and_r2_are_those_of_the_data() -> None:
    x, y, weight, _ = data(300, noise=2.0)
    bias = torch.ones(H, dtype=torch.float64)
    missed = (y - x @ weight.T - bias).square().sum(1).mean()
    spread = (y - y.mean(0)).square().sum(1).mean()
    assert moments(x, y).error(weight, bias) == pytest.approx(float(missed), rel=1e-9)
    assert moments(x, y).r2(weight, bias) == pytest.approx(float(1 - missed / spread), rel=1e-9)


def test_constant_outputs_have_no_variance_to_explain() -> None:
    x = torch.randn(50, H, generator=torch.Generator().manual_seed(0))
    seen = Moments.zeros(H, H)
    seen.add(x, torch.zeros(50, H))
    fit = fit_ridge(seen, 0.1)
    assert seen.r2(fit.weight, fit.bias) == 0.0
