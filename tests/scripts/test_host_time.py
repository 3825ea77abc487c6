"""Where a tick's time goes: only the engine's thread is watched, every second counts once, nothing stays patched."""

import re
import sys
from pathlib import Path

import pytest
import torch
import typer

from exeunt.compression.model import load_bundle
from exeunt.deploy.bench_engine import engine_driver
from exeunt.deploy.bench_load import Load
from exeunt.kernels.native.library import native_library
from exeunt.server.lifecycle import Lifecycle
from exeunt.server.runner import Runner
from scripts import host_time
from scripts.tick_time import HostTime, watching
from tests.deploy.server_process import byte_bundle

RUN = "server.lifecycle: Lifecycle.run"


def _functions() -> list[object]:
    imported = vars(sys.modules["exeunt.server.whole_passes"])["plain_draw"]
    return [Runner.run, Lifecycle.next_tick, imported]


def test_seconds_of_functions_add_up_to_the_tick_and_nothing_stays_watched(tmp_path: Path) -> None:
    before = _functions()
    model = load_bundle(byte_bundle(tmp_path), device="cpu", dtype=torch.float32)
    load = Load(1, 8, 30, 1, 0.0)
    driver = engine_driver(model, load)
    try:
        prompts = driver.prompts(1, load.prompt_tokens)
        with watching() as found:
            driver.run(prompts, {"early_exit": {"mode": "verified"}}, load)
        ticks = len(found.ticks)
        driver.run(prompts, {}, load)
    finally:
        driver.close()
    assert _functions() == before
    assert len(found.ticks) == ticks > 5
    for tick in found.ticks:
        assert 0 < sum(seconds for name, seconds in tick.items() if name) <= tick[""] * 1.001
        assert all(seconds >= 0 for seconds in tick.values())
    medians = found.medians()
    assert next(iter(medians)) == ""
    assert {RUN, "server.runner: Runner.run"} <= medians.keys()
    assert not any("bench" in name for name in medians)


def test_the_hosts_part_of_a_tick_is_told_and_nothing_stays_patched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = native_library()
    before = _functions(), None if library is None else library.model_pass
    bundle = byte_bundle(tmp_path)
    host_time.main(1, "off", "int4", 30, "cpu", bundle, 0)
    found = re.search(r"outside native passes: (\d+) µs of CPU a tick", capsys.readouterr().out)
    assert found is not None
    assert int(found[1]) > 0
    assert before == (_functions(), None if library is None else library.model_pass)


def test_a_function_that_raises_is_counted_and_its_caller_goes_on() -> None:
    found = HostTime()

    def raises() -> None:
        raise KeyError("x")

    inner = found.watched("inner", raises)

    def catches() -> str:
        with pytest.raises(KeyError):
            inner()
        return "caught"

    outer = found.watched(RUN, catches)
    assert outer() == "caught"  # no tick has begun: nothing is counted
    found.next_tick()
    assert outer() == "caught"
    found.next_tick()
    found.next_tick()  # nothing was run since: no tick
    (tick,) = found.ticks
    assert set(tick) == {"", "inner", RUN}
    assert tick["inner"] + tick[RUN] <= tick[""]


def test_no_tick_has_no_medians() -> None:
    assert HostTime().medians() == {}


def test_the_command_prints_what_took_longest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host_time.main(2, "verified", "full", 8, "cpu", byte_bundle(tmp_path), 5)
    said = capsys.readouterr().out
    assert "µs a tick" in said
    assert said.count("│ server.") + said.count("│ kernels.") + said.count("│ compression.") == 5


@pytest.mark.parametrize(("mode", "weights"), [("fast", "int4"), ("off", "int8")])
def test_what_there_is_not_is_refused(mode: str, weights: str) -> None:
    with pytest.raises(typer.BadParameter, match="modes are off, verified"):
        host_time.main(1, mode, weights)
