"""Launches that are chosen by measurement: no bit but the rule's, and a search that ends on a GPU."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from exeunt.kernels.full_linear import triton as full_linear
from exeunt.kernels.full_linear.triton import full_linear_triton
from exeunt.kernels.int4_linear import triton as int4_linear
from exeunt.kernels.int4_linear.pairs import pack_pairs
from exeunt.kernels.int4_linear.triton import int4_linear_triton
from exeunt.kernels.int4_linear.weight import quantize
from exeunt.kernels.linear_parts import MOST_COUNTERS, launch_for
from exeunt.kernels.linear_tiles import Tile
from exeunt.kernels.tuned import launches
from exeunt.kernels.tuned.launches import TunedLaunch, forced
from exeunt.kernels.tuned.shape import LinearShape
from tests.kernels.triton.linear_checks import TOLERANCE, relative_error

BF16 = torch.bfloat16
GPU = torch.device("cuda")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FULL_TILES = [Tile(8, 128, 4), Tile(32, 64, 3, 4), Tile(64, 128, 4, 8), Tile(128, 64, 3, 4)]
INT4_TILES = [
    Tile(8, 32, 4, 1),
    Tile(8, 128, 3),
    Tile(16, 32, 4),
    Tile(32, 64, 3),
    Tile(64, 128, 3, 8),
    Tile(128, 64, 3, 4),
    Tile(16, 128, 3, 4),
]


def _with(launch: TunedLaunch | None, x: Tensor, weight: Tensor) -> Tensor:
    with forced(launch):
        return full_linear_triton(x, weight)


@pytest.mark.parametrize("launch", [TunedLaunch(Tile(8, 32, 2), True), TunedLaunch(Tile(32, 64, 2), False)])
def test_a_launch_is_what_it_is_told_to_be(seed: int, device: str, launch: TunedLaunch) -> None:
    weight, x = (torch.randn(rows, 520, device=device).to(BF16) for rows in (70, 9))
    expected = x.double() @ weight.double().t()
    assert relative_error(_with(launch, x, weight), expected) < TOLERANCE[BF16]


@pytest.mark.parametrize(
    ("tile", "tokens", "outputs"), [(Tile(8, 64, 4), 8, 32 * MOST_COUNTERS), (Tile(128, 64, 3, 4), 512, 4096)]
)
def test_parts_are_left_in_memory_as_far_as_counters_and_scratch_reach(
    tile: Tile, tokens: int, outputs: int
) -> None:
    """Gated: twice as many outputs are summed; eight parts of 512 × 8192 of them fill the scratch."""
    with forced(TunedLaunch(tile, split=True)):
        launches = [launch_for(tokens, 2048, outputs + more, True, BF16, int4=False) for more in (0, 1)]
    assert [launch.split for launch in launches] == [True, False]
    assert [launch.grid[2] for launch in launches] == [8, 1]


def _first_sums(product: Callable[[Tensor | None], Tensor]) -> Tensor:
    from exeunt.kernels.tuned.trials import first_sums

    return first_sums(product)


@pytest.mark.parametrize(("dtype", "scale"), [(BF16, 1e-3), (BF16, 1.0), (BF16, 1e3), (torch.float16, 100.0)])
def test_all_bits_of_sums_are_read_out_of_rounded_results(
    seed: int, dtype: torch.dtype, scale: float
) -> None:
    sums = scale * torch.randn(3, 4096)
    sums[0, :2] = torch.tensor([0.0, 1.0])

    def product(bias: Tensor | None) -> Tensor:
        return (sums if bias is None else sums + bias).to(dtype)

    found = _first_sums(product)
    if dtype == BF16:
        assert torch.equal(found, sums[0])
    else:
        large = sums[0].abs() >= 0.5  # float16 ends where the last bits of smaller ones lie
        assert torch.equal(found[large], sums[0][large])


@pytest.mark.parametrize("int4", [False, True])
def test_low_bits_show_another_order_of_summation(seed: int, device: str, int4: bool) -> None:
    weight, x = torch.randn(64, 512, device=device), torch.randn(2, 512, device=device)
    if int4:
        packed = pack_pairs(quantize(weight, 64))
        turned = pack_pairs(quantize(torch.cat((weight[:, 128:], weight[:, :128]), 1), 64))
        one = partial(int4_linear_triton, x.to(BF16), packed)
        other = partial(int4_linear_triton, x.roll(-128, 1).to(BF16), turned)
    else:
        one = partial(full_linear_triton, x.to(BF16), weight.to(BF16))
        other = partial(full_linear_triton, x.roll(-128, 1).to(BF16), weight.roll(-128, 1).to(BF16))
    less = -_first_sums(one)
    assert not one(less)[0].any()
    assert one(less)[1].any()
    assert int((other(less)[0] != 0).sum()) > 10  # of 64
    assert int((other(None)[0] != one(None)[0]).sum()) < 10


@dataclass(frozen=True)
class Small:
    """A kernel on a GPU that has no room for tiles of 128 outputs."""

    kernel: Any

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            if options["BLOCK"] >= 128:
                raise OutOfResources(300000, 101376, "shared memory")
            self.kernel[grid](*args, **options)

        return run


@pytest.mark.parametrize("int4", [False, True])
def test_a_measured_launch_that_does_not_fit_is_left_for_the_rules(
    seed: int, device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, int4: bool
) -> None:
    weight, x = torch.randn(64, 512, device=device), torch.randn(2, 512, device=device).to(BF16)
    if int4:
        call = partial(int4_linear_triton, x, pack_pairs(quantize(weight, 32)))
    else:
        call = partial(full_linear_triton, x, weight.to(BF16))
    shape = LinearShape(512, 64, int4, group_size=32)
    with forced(None):
        expected = call()
    module, name = (int4_linear, "_int4_linear") if int4 else (full_linear, "_full_linear")
    monkeypatch.setattr(module, name, Small(getattr(module, name)))
    large = TunedLaunch(Tile(8, 128, 4), split=True)
    with forced(large), pytest.raises(OutOfResources):  # a search's
        call()
    fits = TunedLaunch(Tile(16, 32, 4), split=False)
    known = {shape.key(1): large, shape.key(8): fits}
    monkeypatch.setattr(launches, "_known", {0: known})
    monkeypatch.setattr(launches, "_added", {})
    monkeypatch.setattr(launches, "_has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(call(), expected)
    (message,) = caplog.messages
    assert "weights 64 x 512 does not run here, the rule's is taken from now on" in message
    assert "out of resource: shared memory" in message
    assert launches.known_launches(0) == {shape.key(1): None, shape.key(8): fits}


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
        assert not trial.low_bits(TunedLaunch(tile, split)).any(), split


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("group", [32, 48, 64, 128])
@pytest.mark.parametrize("tile", [tile for tile in INT4_TILES if tile.warps > 2], ids=str)
def test_inputs_in_order_have_the_rules_low_bits_in_groups_of_any_size(
    seed: int, tile: Tile, group: int
) -> None:
    from exeunt.kernels.tuned.trials import TimedLinear

    if torch.cuda.get_device_capability(GPU)[0] != 9:
        pytest.skip("nobody has compared what sums tiles of more than two warps there: a search does")
    trial = TimedLinear(LinearShape(2016, 1056, True, group_size=group, dtype=BF16), 70, GPU)
    decoding = TunedLaunch(Tile(8, 64, 4), split=True)
    assert not trial.low_bits(decoding).any()  # the rule's is one of those in order, too
    for split in (True, False):
        assert not trial.low_bits(TunedLaunch(tile, split)).any(), split


@pytest.mark.gpu
@on_a_gpu
def test_a_search_finds_the_call_that_comes_first(seed: int) -> None:
    from exeunt.kernels.tuned.search import ORDER
    from exeunt.kernels.tuned.trials import TimedLinear, search_on

    shapes = [LinearShape(2048, 2048, int4) for int4 in (True, False)]
    found = search_on(GPU, shapes, 20.0)
    assert found.findings, found.failed
    if torch.cuda.get_device_capability(GPU)[0] == 9:
        assert (found.unequal, found.failed) == ([], [])
    assert {finding.key.in_features for finding in found.findings} == {2048}
    calls = {shape.key(rows): (shape, rows) for shape in shapes for rows in ORDER}
    for finding in found.faster:  # of other weights than those of the search, too
        other = TimedLinear(*calls[finding.key], GPU)
        launch = finding.launch
        assert torch.equal(other.result(launch).view(torch.int16), other.result(None).view(torch.int16)), (
            launch
        )


@pytest.mark.gpu
@on_a_gpu
def test_what_is_measured_is_run(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = LinearShape(2048, 2048, int4=False)
    weight, x = (torch.randn(rows, 2048, device=GPU).to(BF16) for rows in (2048, 3))
    by_rule = _with(None, x, weight)
    index = torch.cuda.current_device()
    monkeypatch.setattr(launches, "_known", {index: {}})
    monkeypatch.setattr(launches, "_added", {})
    tuned = TunedLaunch(Tile(8, 128, 2), split=False)
    launches.add_launches(index, {shape.key(1): tuned})
    assert launches.tuned_launch(3, 2048, 2048, False, BF16, int4=False) == tuned
    assert torch.equal(full_linear_triton(x, weight), by_rule)
