"""Launches that are chosen by measurement: no bit but the rule's, and a search that ends on a GPU."""

import pytest
import torch
from torch import Tensor

from exeunt.kernels.full_linear.triton import full_linear_triton
from exeunt.kernels.linear_tiles import Tile
from exeunt.kernels.tuned.launches import TunedLaunch, forced
from exeunt.kernels.tuned.shape import LinearShape
from tests.kernels.triton.linear_checks import TOLERANCE, relative_error

BF16 = torch.bfloat16
GPU = torch.device("cuda")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FULL_TILES = [Tile(8, 128, 4), Tile(32, 64, 3, 4), Tile(64, 128, 4, 8), Tile(128, 64, 3, 4)]
INT4_TILES = [Tile(8, 32, 4, 1), Tile(8, 128, 3), Tile(16, 32, 4), Tile(32, 64, 3)]


def _with(launch: TunedLaunch | None, x: Tensor, weight: Tensor) -> Tensor:
    with forced(launch):
        return full_linear_triton(x, weight)


@pytest.mark.parametrize("launch", [TunedLaunch(Tile(8, 32, 2), True), TunedLaunch(Tile(32, 64, 2), False)])
def test_a_launch_is_what_it_is_told_to_be(seed: int, device: str, launch: TunedLaunch) -> None:
    weight, x = (torch.randn(rows, 520, device=device).to(BF16) for rows in (70, 9))
    expected = x.double() @ weight.double().t()
    assert relative_error(_with(launch, x, weight), expected) < TOLERANCE[BF16]


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("tokens", [1, 16, 70])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tile", [*FULL_TILES, *INT4_TILES], ids=str)
def test_a_measured_launch_has_the_rules_bits(seed: int, tile: Tile, gated: bool, tokens: int) -> None:
    from exeunt.kernels.tuned.trials import TimedLinear

    if tile.warps > 2 and torch.cuda.get_device_capability(GPU)[0] != 9:
        pytest.skip("nobody has compared what sums tiles of more than two warps there: a search does")
    int4 = tile in INT4_TILES
    trial = TimedLinear(LinearShape(2048, 1056, int4, gated, dtype=BF16), tokens, GPU)
    by_rule = trial.result(None)
    for split in (True, False):
        out = trial.result(TunedLaunch(tile, split))
        assert torch.equal(out.view(torch.int16), by_rule.view(torch.int16)), split


@pytest.mark.gpu
@on_a_gpu
def test_a_search_finds_the_call_that_comes_first(seed: int) -> None:
    from exeunt.kernels.tuned.trials import search_on

    shapes = [LinearShape(2048, 2048, int4) for int4 in (True, False)]
    found = search_on(GPU, shapes, 20.0)
    assert found.findings, found.failed
    if torch.cuda.get_device_capability(GPU)[0] == 9:
        assert (found.unequal, found.failed) == ([], [])
    assert {finding.key.in_features for finding in found.findings} == {2048}
    assert all(finding.seconds <= finding.rule_seconds for finding in found.findings)


@pytest.mark.gpu
@on_a_gpu
def test_what_is_measured_is_run(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from exeunt.kernels.tuned import launches

    shape = LinearShape(2048, 2048, int4=False)
    weight, x = (torch.randn(rows, 2048, device=GPU).to(BF16) for rows in (2048, 3))
    by_rule = _with(None, x, weight)
    index = torch.cuda.current_device()
    monkeypatch.setattr(launches, "_known", {index: {}})
    tuned = TunedLaunch(Tile(8, 128, 2), split=False)
    launches.add_launches(index, {shape.key(1): tuned})
    assert launches.tuned_launch(3, 2048, 2048, False, BF16, int4=False) == tuned
    assert torch.equal(full_linear_triton(x, weight), by_rule)
