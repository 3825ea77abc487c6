"""What of the GPU check's kernel speeds takes Triton: launches chosen freely, and products with what stands around."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from exeunt.kernels import gpu, linear_parts
from exeunt.kernels.int4_linear import quantize
from exeunt.kernels.int4_linear.triton import int4_linear_triton
from exeunt.kernels.linear_tiles import Tile
from exeunt.kernels.timing import Timing
from exeunt.kernels.tuned.launches import TunedLaunch, forced, tuned_launch
from exeunt.kernels.tuned.shape import LinearShape
from scripts.gpu_check import free_launches, kernel_speeds
from scripts.gpu_check.free_launches import FreeLaunch, chosen, fastest_free
from scripts.gpu_check.report import Clock, Context, Report

CPU = torch.device("cpu")
SHAPE = LinearShape(1024, 64, int4=True, group_size=32)


def _launch() -> linear_parts.Launch:
    return linear_parts.launch_for(4, 1024, 64, False, torch.bfloat16, int4=True, group_size=32)


def test_ways_are_tiles_by_parts_each_once() -> None:
    for shape in (SHAPE, LinearShape(1024, 64, int4=False), LinearShape(1024, 64, True, gated=True)):
        for rows in kernel_speeds.ROWS:
            ways = free_launches.free_launches(shape, rows)
            assert len(set(ways)) == len(ways)
            assert {way.parts for way in ways} == {1, 2, 4}  # of 256 inputs at least
            assert all(way.launch.split == (way.parts > 1) for way in ways)


def test_a_way_is_what_a_call_runs_with_and_nothing_behind_it() -> None:
    with forced(None):
        before = _launch()
        with chosen(FreeLaunch(TunedLaunch(Tile(16, 64, 3), split=True), 2)):
            launch = _launch()
            assert (launch.tile, launch.parts, launch.split) == (Tile(16, 64, 3), 2, True)
        assert _launch() == before


def test_a_call_in_another_way_has_the_same_result_but_for_rounding() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 512, generator=draw)
    weight = quantize(torch.randn(32, 512, generator=draw), 32)
    with chosen(FreeLaunch(TunedLaunch(Tile(8, 64, 3), split=False), 1)):
        found = int4_linear_triton(x, weight)
    torch.testing.assert_close(found, int4_linear_triton(x, weight), rtol=1e-4, atol=1e-3)


def _timings(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[TunedLaunch, int], float]) -> None:
    """Calls take so long as `seconds` says of the launch and the parts that they run with."""

    def timed(calls: Sequence[Callable[[], object]], device: torch.device, **rest: Any) -> Timing:
        launch = tuned_launch(4, 1024, 64, False, torch.bfloat16, int4=True, group_size=32)
        assert launch is not None
        return Timing(seconds(launch, linear_parts.parts_of(1024)), "graph")

    monkeypatch.setattr(free_launches, "timed", timed)


def test_the_fastest_way_is_found_and_those_that_do_not_run_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seconds(launch: TunedLaunch, parts: int) -> float:
        if launch.tile.outputs == 128:
            raise RuntimeError("out of shared memory")
        return 1e-5 * launch.tile.stages / parts

    _timings(monkeypatch, seconds)
    found = fastest_free([lambda: None], SHAPE, 4, CPU, lambda: 1.0)
    assert (found["tile"][:3], found["parts"]) == ([8, 64, 3], 4)
    assert found["us"] == pytest.approx(1e6 * 3e-5 / 4)
    assert found["tried"] + found["failed"] == found["ways"]
    assert found["failed"] > 0


def test_the_search_ends_with_its_time_and_one_that_found_nothing_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _timings(monkeypatch, lambda launch, parts: 1e-5)
    assert fastest_free([lambda: None], SHAPE, 4, CPU, lambda: -1.0)["tried"] == 1

    def fails(launch: TunedLaunch, parts: int) -> float:
        raise RuntimeError("out of shared memory")

    _timings(monkeypatch, fails)
    with pytest.raises(RuntimeError, match="launches ran"):
        fastest_free([lambda: None], SHAPE, 4, CPU, lambda: 1.0)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors go to Triton's interpreter, and nothing is timed."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter runs where there is no GPU")
    monkeypatch.setattr(gpu, "interpreted", True)

    def once(calls: Sequence[Callable[[], object]], device: torch.device, **rest: Any) -> Timing:
        calls[0]()
        return Timing(1e-5, "clock")

    monkeypatch.setattr(kernel_speeds, "timed", once)
    monkeypatch.setattr(free_launches, "timed", once)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_linears_are_timed_gated_and_with_their_launches_chosen_freely(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernel_speeds, "_free_choices", lambda context: iter([("toy up", 1, "int4")]))
    monkeypatch.setattr(kernel_speeds, "_SECONDS_A_CHOICE", 90.0)  # cores may be busy
    every = kernel_speeds.cases

    def some(context: Context) -> Any:
        return (case for case in every(context) if case.op in ("int4_linear", "gated_linear"))

    monkeypatch.setattr(kernel_speeds, "cases", some)
    context = Context(CPU, True, Report(tmp_path / "out.json"), Clock(100.0))
    found: dict[str, Any] = {}
    kernel_speeds.run(context, found)
    assert context.report.failures == []
    gated = [case for case in found["cases"] if case["op"] == "gated_linear"]
    assert [case["rows"] for case in gated] == [1, 4]
    assert all(case["full"]["us"] > 0 and case["torch"]["us"] > 0 for case in gated)
    free = [case for case in found["cases"] if "int4_free" in case]
    assert [(case["layer"], case["rows"]) for case in free] == [("toy up", 1)]
    assert free[0]["int4_free"]["tried"] == free[0]["int4_free"]["ways"] > 1


@pytest.mark.usefixtures("interpreted")
def test_ways_are_compiled_before_they_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[TunedLaunch | None] = []

    def stands(x: Tensor, weight: Any) -> None:
        ran.append(tuned_launch(1, 128, 64, False, torch.bfloat16, int4=True, group_size=32))

    monkeypatch.setattr(kernel_speeds, "int4_linear", stands)
    context = Context(CPU, True, Report(tmp_path / "out.json"), Clock(100.0))
    jobs = list(kernel_speeds.free_warm_jobs(context, "int4"))
    jobs[0]()
    assert len(jobs) == 2
    assert len(set(ran)) == len(ran) > 1
