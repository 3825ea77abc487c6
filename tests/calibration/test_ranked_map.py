"""A map in every rank: its cuts cost what theory says, R² by rank is that of each cut, and the curve is monotone."""

import pytest
import torch

from exeunt.calibration.block_fit import AffineFit, Moments, choose_ridge, fit_ridge
from exeunt.calibration.ranked_map import RankedMap, parameters_of, rank_within
from tests.calibration.planted import H, data, moments


def cut_errors(seen: Moments, fit: AffineFit) -> torch.Tensor:
    """What theory says that the cut to each rank adds: the eigenvalues of the fitted outputs left out, [H + 1]."""
    outputs = fit.weight @ seen.cov_xx @ fit.weight.T + fit.penalty * fit.weight @ fit.weight.T
    smallest_first = torch.linalg.eigvalsh(outputs)
    return torch.cat([smallest_first.cumsum(0).flip(0), smallest_first.new_zeros(1)])


@pytest.mark.parametrize("rank", [0, 1, 4, H])
@pytest.mark.parametrize("penalty", [0.0, 1.5])
def test_the_cut_costs_the_eigenvalues_left_out(rank: int, penalty: float) -> None:
    x, y, _, _ = data(400, noise=1.0)
    seen = moments(x, y)
    fit = fit_ridge(seen, penalty)
    up, down, bias = RankedMap.of(seen, fit).cut(rank)
    assert up.shape == (H, rank)

    def penalised(weight: torch.Tensor, constant: torch.Tensor) -> float:
        return seen.error(weight, constant) + penalty * float(weight.square().sum())

    added = penalised(up @ down, bias) - penalised(fit.weight, fit.bias)
    assert added == pytest.approx(float(cut_errors(seen, fit)[rank]), abs=1e-8 * seen.variance_y)


def test_the_fitted_error_falls_with_every_rank() -> None:
    x, y, _, _ = data(400, noise=1.0)
    seen = moments(x, y)
    ranked = RankedMap.of(seen, fit_ridge(seen, 0.0))
    cuts = (ranked.cut(rank) for rank in range(H + 1))
    errors = torch.tensor([seen.error(up @ down, bias) for up, down, bias in cuts])
    assert (errors.diff() < 0).all()


def test_the_cut_beats_cutting_the_weight_itself() -> None:
    x, y, _, _ = data(400, noise=1.0)
    seen = moments(x, y)
    fit = fit_ridge(seen, 0.1)
    up, down, bias = RankedMap.of(seen, fit).cut(3)
    u, s, v = torch.linalg.svd(fit.weight)
    naive = u[:, :3] @ torch.diag(s[:3]) @ v[:3]
    assert seen.error(up @ down, bias) < seen.error(naive, seen.mean_y - naive @ seen.mean_x)


def test_r2_by_rank_is_that_of_every_cut_on_other_tokens() -> None:
    x, y, _, _ = data(400, noise=2.0)
    seen = moments(x, y)
    ranked = RankedMap.of(seen, fit_ridge(seen, 0.5))
    other_x, other_y, _, _ = data(150, seed=4, noise=2.0)
    others = moments(other_x + 0.5, other_y - 1.0)  # of another mean, so that the constants matter
    found = ranked.r2_by_rank(others)
    assert found.shape == (H + 1,)
    for rank in range(H + 1):
        up, down, bias = ranked.cut(rank)
        assert float(found[rank]) == pytest.approx(others.r2(up @ down, bias), abs=1e-9)


def test_a_planted_map_is_whole_at_its_own_rank() -> None:
    x, _, weight, bias = data(600)
    u, s, v = torch.linalg.svd(weight)
    planted = u[:, :5] @ torch.diag(s[:5]) @ v[:5]
    seen = moments(x, x @ planted.T + bias)
    r2 = RankedMap.of(seen, choose_ridge(seen, seen)).r2_by_rank(seen)
    assert float(r2[5]) == pytest.approx(1.0, abs=1e-6)
    assert float(r2[4]) < 0.9999
    block = RankedMap.of(seen, choose_ridge(seen, seen)).linear_block(3, 5)
    assert (block.index, block.rank) == (3, 5)
    torch.testing.assert_close(
        block.apply(x.float()), (x + x @ planted.T + bias).float(), atol=1e-2, rtol=1e-3
    )


def test_constant_outputs_have_nothing_to_explain() -> None:
    x, _, _, _ = data(200)
    seen = moments(x, torch.zeros(200, H))
    assert RankedMap.of(seen, fit_ridge(seen, 0.1)).r2_by_rank(seen).tolist() == [0.0] * (H + 1)


def test_a_map_is_the_same_when_it_comes_out_of_one_array() -> None:
    x, y, _, _ = data(300, noise=1.0)
    seen = moments(x, y)
    ranked = RankedMap.of(seen, fit_ridge(seen, 0.5))
    again = RankedMap.unpacked(ranked.packed())
    for one, other in zip(ranked.cut(4), again.cut(4), strict=True):
        assert torch.equal(one, other)


def test_rank_stays_within_the_budget_and_is_never_zero() -> None:
    rank = rank_within(218_000_000 / 34, 4096)
    assert rank == 782
    assert parameters_of(rank, 4096) <= 218_000_000 / 34 < parameters_of(rank + 1, 4096)
    assert rank_within(10, 64) == 1
    assert rank_within(1e9, 64) == 64
