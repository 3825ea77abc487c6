"""The visitor that fits blocks: it finds a planted one, judges on tokens it did not fit, and can be taken up again."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from exeunt.calibration.activations import Scratch
from exeunt.calibration.block_fitter import BlockFitter
from exeunt.calibration.ranked_map import parameters_of

H, TOKENS, FIT = 10, 900, 600
RANK = 3
PARAMETERS = 4 * parameters_of(RANK, H)


def states(block: int) -> tuple[Tensor, Tensor]:
    """In front of and behind a block: one that is affine of rank 3, then one that is not affine at all."""
    g = torch.Generator().manual_seed(block)
    before = torch.randn(TOKENS, H, generator=g) @ torch.randn(H, H, generator=g)
    if block == 0:
        weight = torch.randn(H, RANK, generator=g) @ torch.randn(RANK, H, generator=g)
        return before, before + before @ weight.T + torch.randn(H, generator=g)
    return before, before + 0.3 * torch.randn(TOKENS, H, generator=g)


def fitter(folder: Path) -> BlockFitter:
    return BlockFitter(H, PARAMETERS, FIT, torch.device("cpu"), Scratch(folder), reduction=4.0)


def show(visitor: BlockFitter, block: int) -> None:
    before, after = states(block)
    for start, stop in (
        (0, 500),
        (500, 700),
        (700, TOKENS),
    ):  # one batch lies on both sides of the splits' border
        visitor.see(block, slice(start, stop), before[start:stop], after[start:stop])
    visitor.finish(block)


@pytest.fixture
def passed(tmp_path: Path) -> BlockFitter:
    visitor = fitter(tmp_path)
    for block in range(2):
        show(visitor, block)
    return visitor


def test_a_planted_affine_block_is_explained_whole_at_its_own_rank(passed: BlockFitter) -> None:
    planted, noise = passed.fits
    assert planted.map.rank == RANK
    assert planted.r2 == pytest.approx(1.0, abs=1e-5)
    assert planted.r2_cut == pytest.approx(1.0, abs=1e-5)
    assert planted.missed == pytest.approx(0.0, abs=1e-5)
    assert passed.ranked[0].r2[RANK - 1] < 0.999
    before, after = states(0)
    torch.testing.assert_close(planted.map.apply(before), after, atol=2e-2, rtol=1e-3)
    assert abs(noise.r2) < 0.05


def test_what_is_missed_is_the_error_over_the_size_of_the_state(passed: BlockFitter) -> None:
    for block, fit in enumerate(passed.fits):
        before, after = (x[FIT:].double() for x in states(block))
        error = (fit.map.apply(before.float()).double() - after).square().sum() / after.square().sum()
        assert fit.missed == pytest.approx(float(error), rel=1e-4, abs=1e-9)
        spread = after - before - (after - before).mean(0)
        wrong = fit.map.apply(before.float()).double() - after
        assert fit.r2_cut == pytest.approx(1 - float(wrong.square().sum() / spread.square().sum()), abs=1e-5)


def test_a_pass_is_taken_up_behind_the_block_that_was_recorded(passed: BlockFitter, tmp_path: Path) -> None:
    entry = passed.record(0)
    again = fitter(tmp_path)
    assert again.restore(0, entry)
    show(again, 1)
    assert [(fit.r2, fit.r2_cut, fit.missed) for fit in again.fits] == [
        (fit.r2, fit.r2_cut, fit.missed) for fit in passed.fits
    ]
    assert [ranked.r2 for ranked in again.ranked] == [ranked.r2 for ranked in passed.ranked]
    for one, other in zip(again.fits, passed.fits, strict=True):
        assert torch.equal(one.map.up, other.map.up)
        assert torch.equal(one.map.down, other.map.down)
        assert torch.equal(one.map.bias, other.map.bias)


def test_a_map_that_is_no_longer_there_is_not_taken_over(passed: BlockFitter, tmp_path: Path) -> None:
    entry = passed.record(0)
    other = tmp_path / "other"
    other.mkdir()
    assert not fitter(other).restore(0, entry)
    assert not fitter(tmp_path).restore(1, passed.record(1)), "block 0 is not known"
