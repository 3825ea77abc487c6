"""The GPU check's grid of batches and contexts: its cells, what has no room or no time, and what is compiled."""

import itertools
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exeunt.compression.model import LoadedModel
from scripts.gpu_check import compiled, end_to_end, grid, room, transformers_speeds
from scripts.gpu_check.long_contexts import cell, engine_in_context
from scripts.gpu_check.models import LLAMA, MISTRAL, TOY
from scripts.gpu_check.parts import Part
from scripts.gpu_check.prompts import packaged_prompts, shifted_prompts
from scripts.gpu_check.report import Context
from scripts.gpu_check.sizes import Sizes
from tests.scripts.toy_gpu_check import check, toy_context


def _on_gpu(tmp_path: Path) -> Context:
    return replace(toy_context(tmp_path), device=torch.device("cuda", 0), quick=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    found = end_to_end.random_model(toy_context(tmp_path_factory.mktemp("grid")), {}, TOY, rate=None)
    assert found is not None
    return found


def test_every_batch_meets_every_context_once() -> None:
    assert sorted(grid.CELLS) == sorted(itertools.product(grid.STREAMS, grid.CONTEXTS))
    assert check.SECTIONS["grid"].extra
    assert {each[1:] for each in grid.COMPILED} <= {*grid.CELLS}
    assert {shape.name for shape, *_ in grid.COMPILED} == {MISTRAL.name, LLAMA.name}


def test_a_shapes_parts_come_in_order_and_share_the_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken: list[Part] = []
    monkeypatch.setattr(grid, "run_parts", lambda context, found, parts: taken.extend(parts))
    grid.run(_on_gpu(tmp_path), {})
    assert [part.name for part in taken] == [
        *(f"{who} {shape.name}" for shape in (MISTRAL, LLAMA) for who in ("engine", "transformers")),
        "compiled",
    ]
    assert sum(part.seconds for part in taken) == pytest.approx(100, abs=1)
    assert taken[0].seconds == max(part.seconds for part in taken)


def test_the_first_cells_may_take_more_than_their_share_and_none_all(tmp_path: Path) -> None:
    context = toy_context(tmp_path, 160.0)
    lefts = [grid.share_of(context, cells).clock.left() for cells in (16, 4, 1)]
    assert lefts == [pytest.approx(30, abs=2), pytest.approx(120, abs=2), pytest.approx(160, abs=2)]


def test_a_run_is_expected_to_take_what_the_device_and_the_runs_before_say(tmp_path: Path) -> None:
    context = _on_gpu(tmp_path)
    context.report.section("machine")["matmul_bf16_flop_per_s"] = 1e15
    long, short = Sizes((16,), 16384, 32), Sizes((1,), 512, 32)
    pace = grid._pace(context, MISTRAL.spec(), "engine")
    assert 12 < pace.expected(long) < 25
    assert pace.expected(short) == pytest.approx(0.65, abs=0.1)
    assert pace.needed(long) == 3 * pace.expected(long)
    own: dict[str, Any] = {
        "prompt": 512,
        "engine a, 1 streams": {"seconds": 2 * pace.expected(short)},
        "engine b, 1 streams": {"seconds": 3 * pace.expected(short)},
        "engine b, 16 streams": {"seconds": 99.0},
        "transformers generate static, 1 streams": {"seconds": 99.0},
    }
    pace.note(short, own, "engine")
    assert pace.off == pytest.approx(3)
    pace.note(short, {"engine a, 1 streams": {"seconds": 1e-3}}, "engine")
    assert pace.off == grid._LEAST_OFF
    pace.note(short, {"transformers generate static, 1 streams": {"error": "none"}}, "transformers")
    assert pace.off == grid._LEAST_OFF


@pytest.mark.parametrize(("gigabytes", "formats"), [(6.0, ("full", "int4")), (5.0, ("int4",)), (4.0, None)])
def test_full_keys_and_values_without_room_leave_int4_ones(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: LoadedModel,
    gigabytes: float,
    formats: tuple[str, ...] | None,
) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda device: int(gigabytes * 1e9))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    own: dict[str, Any] = {}
    held = grid.with_room(_on_gpu(tmp_path), model, Sizes((4096,), 1000, 24), own)
    assert (None if held is None else held.kv_formats) == formats
    lacking = ["full and int4", "int4"][: {6.0: 0, 5.0: 1, 4.0: 2}[gigabytes]]
    told = [line.partition(" needs ")[0] for line in own.get("skipped", [])]
    assert told == [f"engine, toy, 4096 x 1000 in {each} keys and values" for each in lacking]
    if held is not None:
        modes = end_to_end.offered(held, grid.MODES, own)
        assert ("full/full" in modes) == ("full" in held.kv_formats)
        assert "int4/int4" in modes


def test_a_load_that_would_take_too_long_is_named(tmp_path: Path, model: LoadedModel) -> None:
    context, found, sizes = toy_context(tmp_path), dict[str, Any](), Sizes((2,), 16, 3)
    own = cell(found, model.name, sizes)
    engine_in_context(context, own, model, [[1] * 16] * 2, grid.MODES, sizes, 1e6)
    theirs = grid._pace(replace(context, quick=False), TOY.spec(), "transformers")
    theirs.off = 1e12
    grid._generate(replace(context, quick=False), own, None, theirs, sizes)
    assert found == {"toy, contexts of 16": own}
    assert own["skipped"] == [
        "engine, toy, contexts of 16, 2 streams: no time left",
        "transformers generate static, 2 streams, contexts of 16: no time left",
    ]


def test_what_is_compiled_is_told_its_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[list[str]] = []

    def process(line: list[str], **rest: Any) -> SimpleNamespace:
        said.append(line)
        return SimpleNamespace(returncode=124)

    monkeypatch.setattr(subprocess, "run", process)
    monkeypatch.setattr(grid, "has_room", lambda *asked: True)
    cells: dict[str, Any] = {}
    grid._compiled(cells, _on_gpu(tmp_path), {})
    assert [line[line.index("scripts.gpu_check.compiled") + 1] for line in said[:2]] == [
        MISTRAL.name,
        LLAMA.name,
    ]
    assert said[0][-4:] == ["--prompt", "512", "--answer", str(grid.ANSWER)]
    llama = cells["llama-1.1b, contexts of 512"]
    for streams in (1, 16):
        assert llama[f"transformers generate compiled, {streams} streams"]["error"].startswith("not done in ")


def test_a_compiled_llama_is_its_own_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built: list[str] = []
    ran: list[tuple[int, int, int]] = []

    def speed(
        context: Context, theirs: Any, prompts: list[list[int]], answer: int, **rest: Any
    ) -> dict[str, Any]:
        ran.append((len(prompts), len(prompts[0]), answer))
        return {}

    monkeypatch.setattr(compiled, "transformers_model", lambda context, shape: built.append(shape.name))
    monkeypatch.setattr(compiled, "generate_speed", speed)
    said = [LLAMA.name, "3", str(tmp_path / "out.json"), "--device", "cpu"]
    compiled.main([*said, "--prompt", "40", "--answer", "5"])
    compiled.main(said)
    assert built == [LLAMA.name] * 2
    assert ran == [(3, 40, 5), (3, 256, 64)]


def test_a_static_cache_that_is_not_compiled_is_warmed_up_once(tmp_path: Path) -> None:
    class Model:
        def generate(self, ids: torch.Tensor, **rest: Any) -> None:
            assert rest["cache_implementation"] == "static"

    settings: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}
    found = transformers_speeds.generate_speed(toy_context(tmp_path), Model(), [[1, 2]], 4, **settings)
    assert len(found["warm_up_seconds"]) == 1


def test_shifted_prompts_are_of_one_passage() -> None:
    first, second, third = shifted_prompts(3, 20)
    (passage,) = packaged_prompts(1, 22)
    assert (first, second, third) == (passage[:20], passage[1:21], passage[2:])
