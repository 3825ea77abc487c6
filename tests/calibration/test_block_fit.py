"""The linear map: it finds what was planted, equals the closed forms, and its cut costs what theory says."""

import pytest
import torch

from exeunt.calibration.block_fit import (
    Moments,
    choose_ridge,
    cut_error,
    cut_rank,
    fit_ridge,
    linear_block,
    rank_within,
    ridge_map,
)

H = 12


def data(
    tokens: int, seed: int = 0, noise: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Correlated inputs, planted outputs, and the planted weight and bias."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(H, H, generator=g, dtype=torch.float64)
    x = torch.randn(tokens, H, generator=g, dtype=torch.float64) @ mix + 3.0
    planted = torch.Generator().manual_seed(99)
    weight = torch.randn(H, H, generator=planted, dtype=torch.float64)
    bias = torch.randn(H, generator=planted, dtype=torch.float64)
    return (
        x,
        x @ weight.T + bias + noise * torch.randn(tokens, H, generator=g, dtype=torch.float64),
        weight,
        bias,
    )


def moments(x: torch.Tensor, y: torch.Tensor) -> Moments:
    """In uneven pieces, as activations arrive."""
    total = Moments.zeros(H, H)
    for start, stop in ((0, 7), (7, 100), (100, len(x))):
        total.add(x[start:stop], y[start:stop])
    return total


def test_a_planted_map_is_found() -> None:
    x, y, weight, _ = data(500)
    seen = moments(x, y)
    fit = choose_ridge(seen, moments(*data(200, seed=1)[:2]))
    torch.testing.assert_close(fit.weight, weight, atol=1e-3, rtol=1e-3)
    assert seen.r2(fit.weight, fit.bias) == pytest.approx(1.0, abs=1e-6)
    block = linear_block(seen, fit, 5, H)
    torch.testing.assert_close(block.apply(x.float()), (x + y).float(), atol=1e-2, rtol=1e-3)


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


@pytest.mark.parametrize("rank", [1, 4, H])
@pytest.mark.parametrize("penalty", [0.0, 1.5])
def test_the_cut_costs_the_eigenvalues_left_out(rank: int, penalty: float) -> None:
    x, y, _, _ = data(400, noise=1.0)
    seen = moments(x, y)
    fit = fit_ridge(seen, penalty)
    up, down, bias = cut_rank(seen, fit, rank)
    assert up.shape == (H, rank)

    def penalised(weight: torch.Tensor, constant: torch.Tensor) -> float:
        return seen.error(weight, constant) + penalty * float(weight.square().sum())

    added = penalised(up @ down, bias) - penalised(fit.weight, fit.bias)
    assert added == pytest.approx(cut_error(seen, fit, rank), abs=1e-8 * seen.variance_y)


def test_the_cut_beats_cutting_the_weight_itself() -> None:
    x, y, _, _ = data(400, noise=1.0)
    seen = moments(x, y)
    fit = fit_ridge(seen, 0.1)
    up, down, bias = cut_rank(seen, fit, 3)
    u, s, v = torch.linalg.svd(fit.weight)
    naive = u[:, :3] @ torch.diag(s[:3]) @ v[:3]
    assert seen.error(up @ down, bias) < seen.error(naive, seen.mean_y - naive @ seen.mean_x)


def test_rank_stays_within_the_budget_and_is_never_zero() -> None:
    rank = rank_within(218_000_000 / 34, 4096)
    assert rank == 782
    assert 4096 + rank * 2 * 4096 <= 218_000_000 / 34 < 4096 + (rank + 1) * 2 * 4096
    assert rank_within(10, 64) == 1


def test_constant_outputs_have_no_variance_to_explain() -> None:
    x = torch.randn(50, H, generator=torch.Generator().manual_seed(0))
    seen = Moments.zeros(H, H)
    seen.add(x, torch.zeros(50, H))
    fit = fit_ridge(seen, 0.1)
    assert seen.r2(fit.weight, fit.bias) == 0.0
