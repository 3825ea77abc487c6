"""The parts of the engine's speeds, exits that let a stated share leave, and what is warm before it is timed."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from exeunt.calibration.block_fitter import REDUCTION
from exeunt.calibration.ranked_map import rank_within
from exeunt.kernels.exit_gate import exit_state
from scripts.gpu_check import (
    compiled,
    end_to_end,
    engine_speeds,
    synthetic_exit,
    transformers_speeds,
)
from scripts.gpu_check.models import TOY, random_decoders
from scripts.gpu_check.paged_loads import paged_bytes
from scripts.gpu_check.paged_rows import PagedRows, greedy
from scripts.gpu_check.parts import Part, run_parts
from scripts.gpu_check.report import Context, Report
from scripts.gpu_check.sizes import Sizes
from scripts.gpu_check.synthetic_block import with_linear_block
from scripts.gpu_check.table import table
from tests.scripts.toy_gpu_check import CPU, ROOT, breaks, check, toy_context


class _Captures:
    """Stands for a decoder whose graphs grow with the first runs."""

    def __init__(self, grow: int) -> None:
        self.step_graphs, self.pool, self.count = self, self, 0
        self._grow, self.runs = grow, 0

    def run(self) -> None:
        """A run, which captures a graph or none."""
        self.runs += 1
        self.count += self.runs <= self._grow


@pytest.mark.parametrize(("grow", "runs"), [(0, 1), (2, 3), (99, engine_speeds._MOST_WARM_RUNS)])
def test_a_load_is_run_until_nothing_is_captured_any_more(tmp_path: Path, grow: int, runs: int) -> None:
    decoder = _Captures(grow)
    model: Any = SimpleNamespace(decoders={"a": decoder, "b": decoder})
    assert engine_speeds.warmed(toy_context(tmp_path), model, decoder.run) == decoder.runs == runs


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.8])
def test_a_synthetic_exit_lets_the_wanted_share_of_the_models_own_tokens_leave(rate: float) -> None:
    spec = TOY.spec()
    decoder = random_decoders(spec, CPU, torch.bfloat16)["int4", False]
    texts = [[(7 * row + place) % 200 + 1 for place in range(12)] for row in range(16)]
    bare = synthetic_exit.synthetic_exit(spec, CPU)
    head = synthetic_exit.with_rate(bare, decoder, "int4", texts, rate)
    with torch.inference_mode():
        states = synthetic_exit._states(decoder, "int4", texts, head.block)
        assert {tuple(each.shape) for each in states} == {(16, spec.hidden_size)}
        logits = torch.cat([exit_state(each, head.weights)[1] for each in states])
    assert float((logits.sigmoid() >= 0.5).float().mean()) == pytest.approx(rate, abs=0.03)
    assert torch.equal(bare.probe.output_bias, torch.zeros(()))


def test_states_of_an_exit_are_those_of_the_greedy_answers() -> None:
    decoder = random_decoders(TOY.spec(), CPU, torch.float32)["full", False]
    with torch.inference_mode():
        rows = PagedRows(decoder, "full", 1, 100)
        answer = greedy(decoder, "full", [3, 5, 8], 4)
        text = torch.tensor([3, 5, 8, *answer])
        batch = rows.batch([0], [range(len(text))])
        wanted = decoder.run_blocks(decoder.embed(text, batch.positions), batch, rows.pages, 0, 1)
        found = synthetic_exit._states(decoder, "full", [[3, 5, 8], [1, 2]], 0)
    for place, states in enumerate(found[:4]):
        torch.testing.assert_close(states[0], wanted[2 + place], rtol=0, atol=1e-4)


def test_modes_that_a_model_without_exits_has_not_are_named_to_the_end(tmp_path: Path) -> None:
    report = Report(tmp_path / "out.json")
    found = report.section("end_to_end").setdefault("packaged", {})
    held = [variant for variant, _ in {**end_to_end.PACKAGED_MODES, **end_to_end.RANDOM_MODES}.values()]
    bare: Any = SimpleNamespace(exits=(), variants=held)
    assert [*end_to_end.offered(bare, end_to_end.PACKAGED_MODES, found)] == ["full/full", "int4/int4"]
    assert len(found["skipped"]) == 2
    report.section("end_to_end")["status"] = "done"
    assert "end_to_end left out 2: engine int4/int4 exits at 0.5: there is no bundle" in table(report)
    with_exits: Any = SimpleNamespace(exits=(1,), variants=held)
    assert end_to_end.offered(with_exits, end_to_end.PACKAGED_MODES, {}) == end_to_end.PACKAGED_MODES


def _part(name: str, run: Callable[[Context, dict[str, Any]], None], seconds: float = 1.0) -> Part:
    return Part(name, name, seconds, 5.0, run)


def test_a_part_that_breaks_or_does_not_fit_leaves_the_others(tmp_path: Path) -> None:
    left: list[float] = []

    def runs(context: Context, found: dict[str, Any]) -> None:
        left.append(context.clock.left())
        found["done"] = True

    context, found = toy_context(tmp_path), dict[str, Any]()
    with pytest.raises(RuntimeError, match="out of luck"):
        run_parts(context, found, [_part("a", breaks), _part("b", runs), _part("c", runs, 30.0)])
    assert (found["b"], found["c"]) == ({"done": True}, {"done": True})
    assert found["broken"] == {"a": "RuntimeError: out of luck"}
    assert left == [pytest.approx(70, abs=5), pytest.approx(100, abs=5)]
    late: dict[str, Any] = {}
    run_parts(toy_context(tmp_path, 4.0), late, [_part("a", breaks)])
    assert late == {"skipped": ["a: no time left"]}


def test_the_parts_of_the_engines_speeds_have_room_in_their_section(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken: list[Part] = []
    monkeypatch.setattr(end_to_end, "run_parts", lambda context, found, parts: taken.extend(parts))
    end_to_end.run(replace(toy_context(tmp_path), quick=False), {})
    assert sum(part.seconds for part in taken) <= check.SECTIONS["end_to_end"].seconds
    assert [part.key for part in taken if part.key == "llama-1.1b"]


@pytest.mark.parametrize("done", [True, False])
def test_what_is_compiled_has_a_process_and_a_limit_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, done: bool
) -> None:
    said: list[list[str]] = []

    def process(line: list[str], **rest: Any) -> SimpleNamespace:
        said.append(line)
        if done:
            Path(line[line.index("--device") - 1]).write_text(json.dumps({"tokens_per_s": 7.0}))
        return SimpleNamespace(returncode=0 if done else 124)

    monkeypatch.setattr(subprocess, "run", process)
    monkeypatch.setattr(compiled, "has_room", lambda *asked: True)
    context = replace(toy_context(tmp_path, 60.0), device=torch.device("cuda"))
    found: dict[str, Any] = {}
    compiled.run(context, found)
    assert said[0][:4] == ["timeout", "-k", "3", "58"]
    (one,) = found["mistral-7b"].values()
    assert one == ({"tokens_per_s": 7.0} if done else {"error": "not done in 58 s (exit status 124)"})
    assert [*found["packaged"]] == [f"transformers generate compiled, {count} streams" for count in (1, 64)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json"]


@pytest.mark.slow
def test_a_compiled_generate_writes_what_it_found(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    line = [sys.executable, "-m", "scripts.gpu_check.compiled", "packaged", "1", str(out)]
    subprocess.run(
        [*line, "--device", "cpu", "--quick"], cwd=ROOT, check=True, capture_output=True, timeout=280
    )
    assert json.loads(out.read_text()).keys() >= {"warm_up_seconds"}


def test_what_a_compiled_generate_compiles_is_not_timed(tmp_path: Path) -> None:
    class Model:
        asked: ClassVar[list[int]] = []

        def generate(self, ids: Tensor, max_new_tokens: int, **rest: Any) -> None:
            self.asked.append(max_new_tokens)

    found = transformers_speeds.generate_speed(
        toy_context(tmp_path), Model(), [[1, 2]], 8, cache_implementation="static"
    )
    assert Model.asked == [8] * 5
    assert len(found["all_seconds"]) == 3
    assert len(found["warm_up_seconds"]) == 2
    late = transformers_speeds.generate_speed(
        toy_context(tmp_path, -1.0), Model(), [[1, 2]], 8, cache_implementation="static"
    )
    assert "tokens_per_s" not in late
    assert late["error"] == "no time left behind the warm-up"


def test_a_linear_block_that_no_calibration_fitted_has_the_rank_that_one_would_choose(tmp_path: Path) -> None:
    plain = end_to_end.random_model(toy_context(tmp_path), {}, TOY)
    assert plain is not None
    model = with_linear_block(plain)
    spec = model.spec
    block = model.decoders["int4", True].linear_block
    assert block is not None
    assert block.rank == rank_within(spec.block_parameters / REDUCTION, spec.hidden_size)
    assert (block.index, block.down.dtype) == (spec.blocks // 2, torch.bfloat16)
    assert ("int4", True) not in plain.decoders
    assert engine_speeds.LINEAR in model.variants
    assert with_linear_block(model) is model  # it has its own


def test_pages_are_counted_while_a_load_runs_and_not_behind_it(tmp_path: Path) -> None:
    model = end_to_end.random_model(toy_context(tmp_path), {}, TOY, rate=None)
    assert model is not None
    sizes = Sizes((2,), 24, 40)  # of several pages
    driver = engine_speeds.engine_driver(model, sizes.load(2))
    try:
        prompts = driver.prompts(2, sizes.prompt)
        for variant in (engine_speeds.FULL, engine_speeds.INT4):
            driver.watch()
            driver.run(prompts, variant, engine_speeds.OFF, sizes.load(2))
            most = driver.most_pages()
            wanted = paged_bytes(model, variant, driver.page_bytes, 64) // driver.page_bytes
            assert most == 2 * wanted > 2
            driver.run(prompts, variant, engine_speeds.OFF, sizes.load(2))
            assert driver.most_pages() == most
            driver.watch()
            assert driver.most_pages() == 0
    finally:
        driver.close()
