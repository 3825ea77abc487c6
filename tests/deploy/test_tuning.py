"""When a loaded model's launches are searched for, what is logged, and where they are kept."""

import logging
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exeunt.compression.model import LoadedModel, load_bundle
from exeunt.deploy import tuning
from exeunt.deploy.loading import find_source, load_model
from exeunt.deploy.tuning import shapes_of, tune_launches
from exeunt.kernels.linear_tiles import Tile
from exeunt.kernels.tuned import files, launches
from exeunt.kernels.tuned.files import Finding, cached_file, read_launches, write_launches
from exeunt.kernels.tuned.launches import MEASURED_ROWS, Key, TunedLaunch, known_launches
from exeunt.kernels.tuned.shape import LinearShape
from exeunt.server.settings import load_settings
from tests.deploy.server_process import byte_bundle

GPU = "NVIDIA Q100"
FAST = TunedLaunch(Tile(8, 64, 4), split=True)
OTHER = TunedLaunch(Tile(16, 64, 4), split=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model that says it is on a GPU, in bfloat16."""
    loaded = load_bundle(byte_bundle(tmp_path_factory.mktemp("tuning")))
    return replace(loaded, device=torch.device("cuda"), dtype=torch.bfloat16)


class Machine:
    """A machine with a GPU; `asked` are the searches made on it, which find one launch that is twice as fast.

    Each tries `calls` of those that it does not know.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.asked: list[tuple[torch.device, list[LinearShape], float]] = []
        self.packaged = folder / "packaged.json"
        self.calls = 10_000
        self._patch = monkeypatch
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.delenv("EXEUNT_TUNED", raising=False)
        monkeypatch.setattr(tuning, "triton_runs", lambda device: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: GPU)
        monkeypatch.setattr(files, "packaged_file", lambda gpu: self.packaged)
        monkeypatch.setattr("exeunt.kernels.tuned.trials.search_on", self._search)
        self.restart()

    def restart(self) -> None:
        """Forget what a process knows."""
        self._patch.setattr(launches, "_known", {})
        self._patch.setattr(launches, "_added", {})

    def _search(
        self,
        device: torch.device,
        shapes: Sequence[LinearShape],
        seconds: float,
        known: Container[Key],
        used: Mapping[Key, TunedLaunch | None],
    ) -> Any:
        from exeunt.kernels.tuned.search import Search

        self.asked.append((device, list(shapes), seconds))
        assert used == known_launches(0)
        keys = list(
            dict.fromkeys(
                shape.key(rows) for rows in MEASURED_ROWS for shape in shapes if shape.key(rows) not in known
            )
        )
        tried = keys[: self.calls]
        found = [Finding(tried[0], FAST, 1e-5, 2e-5), *(Finding(key, None, 1e-5, 1e-5) for key in tried[1:])]
        return Search(found, seconds=3.25, calls=len(keys))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    pytest.importorskip("triton")
    return Machine(monkeypatch, tmp_path)


def test_the_first_start_searches_and_the_next_one_knows(
    machine: Machine, model: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "exeunt"):
        tune_launches(model, 12.5)
    shapes = shapes_of(model)
    assert machine.asked == [(torch.device("cuda", 0), shapes, 12.5)]
    (line,) = caplog.messages
    calls = len({shape.key(rows) for shape in shapes for rows in MEASURED_ROWS})
    assert line.startswith(
        f"Of {calls} calls of these linear layers the fastest launches were not known on {GPU}: {calls} were "
    )
    assert "were tried in 3.2 s, 1 are faster" in line
    assert line.endswith(f"(up to 2.00 times). They are kept in {cached_file(GPU)}.")
    assert known_launches(0)[shapes[0].key(1)] == FAST
    assert read_launches(cached_file(GPU), GPU) == known_launches(0)
    tune_launches(model, 12.5)
    machine.restart()
    tune_launches(model, 12.5)
    assert len(machine.asked) == 1


def test_a_search_that_was_cut_short_goes_on_with_the_next_start(
    machine: Machine, model: LoadedModel
) -> None:
    calls = {shape.key(rows) for shape in shapes_of(model) for rows in MEASURED_ROWS}
    machine.calls = len(calls) - 5
    for _ in range(4):
        tune_launches(model, 5)
        machine.restart()
    assert len(machine.asked) == 2
    assert read_launches(cached_file(GPU), GPU).keys() == calls


def test_another_models_layers_are_searched_for_by_themselves(machine: Machine, model: LoadedModel) -> None:
    tune_launches(replace(model, decoders={("int4", False): model.decoders["int4", False]}), 5)
    tune_launches(model, 5)
    (_, first, _), (_, second, _) = machine.asked
    assert {shape.int4 for shape in first} == {True}
    keys = {shape.key(rows) for shape in (*first, *second) for rows in MEASURED_ROWS}
    found = read_launches(cached_file(GPU), GPU)
    assert found.keys() == keys
    assert sum(launch == FAST for launch in found.values()) == 2


def _off(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("EXEUNT_TUNED", "0")


def _torch_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tuning, "triton_runs", lambda device: False)


@pytest.mark.parametrize(
    ("change", "seconds", "prepare"),
    [
        ({}, 0.0, None),
        ({"dtype": torch.float32}, 20.0, None),
        ({"device": torch.device("cpu")}, 20.0, None),
        ({}, 20.0, _off),
        ({}, 20.0, _torch_alone),
    ],
)
def test_nothing_is_searched_for_where_there_is_nothing_to_choose(
    machine: Machine,
    model: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    seconds: float,
    prepare: Callable[[pytest.MonkeyPatch], None] | None,
) -> None:
    if prepare is not None:
        prepare(monkeypatch)
    tune_launches(replace(model, **change), seconds)
    assert machine.asked == []


def _known(shapes: Sequence[LinearShape]) -> list[Finding]:
    """What a file says that knows all calls of these layers."""
    keys = dict.fromkeys(shape.key(rows) for shape in shapes for rows in MEASURED_ROWS)
    return [Finding(key, FAST, 1.0, 2.0) for key in keys]


def test_what_the_package_knows_of_a_kind_of_gpu_is_not_measured(
    machine: Machine, model: LoadedModel
) -> None:
    write_launches(machine.packaged, GPU, _known(shapes_of(model)))
    tune_launches(model, 20.0)
    assert machine.asked == []


def test_calls_that_the_packages_file_lacks_are_searched_for_once_and_its_own_stay(
    machine: Machine, model: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    first, *others = _known(shapes_of(model))
    write_launches(machine.packaged, GPU, others)
    before = machine.packaged.read_bytes()
    with caplog.at_level(logging.INFO, "exeunt"):
        tune_launches(model, 12.5)
    assert "Of 1 calls of these linear layers the fastest launches were not known" in caplog.text
    assert [seconds for _, _, seconds in machine.asked] == [12.5]
    assert machine.packaged.read_bytes() == before
    assert read_launches(cached_file(GPU), GPU) == {first.key: FAST}
    machine.restart()
    tune_launches(model, 12.5)
    assert len(machine.asked) == 1
    assert known_launches(0) == {finding.key: FAST for finding in (first, *others)}


def test_what_the_package_knows_of_other_kernels_is_used_until_a_start_has_measured_it(
    machine: Machine, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = shapes_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(files, "kernels_digest", lambda: "of another release")
        write_launches(machine.packaged, GPU, [replace(each, launch=OTHER) for each in _known(shapes)])
    assert set(known_launches(0).values()) == {OTHER}
    machine.calls = 3
    tune_launches(model, 20.0)
    found = list(known_launches(0).values())
    assert (found.count(FAST), found.count(None), found.count(OTHER)) == (1, 2, len(found) - 3)
    machine.calls = 10_000
    tune_launches(model, 20.0)
    machine.restart()
    tune_launches(model, 20.0)
    assert len(machine.asked) == 2
    assert OTHER not in known_launches(0).values()


def test_a_bad_file_of_the_package_keeps_no_search_away(machine: Machine, model: LoadedModel) -> None:
    machine.packaged.write_text("spoilt")
    tune_launches(model, 20.0)
    machine.restart()
    tune_launches(model, 20.0)
    assert len(machine.asked) == 1


def test_a_cache_that_cannot_be_written_costs_the_next_start(
    machine: Machine, model: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("in the way")
    with caplog.at_level(logging.INFO, "exeunt"):
        tune_launches(model, 20.0)
    assert "They could not be kept in" in caplog.messages[-1]
    assert caplog.messages[-1].endswith("; each start searches anew (--tuning-seconds 0: none).")
    assert known_launches(0)[shapes_of(model)[0].key(1)] == FAST
    tune_launches(model, 20.0)
    assert len(machine.asked) == 1
    machine.restart()
    tune_launches(model, 20.0)
    assert len(machine.asked) == 2


def test_what_loads_a_model_tunes_it(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tuned: list[tuple[object, float]] = []
    monkeypatch.setattr(
        "exeunt.deploy.loading.tune_launches", lambda model, seconds: tuned.append((model, seconds))
    )
    source = find_source(str(byte_bundle(tmp_path)))
    loaded = load_model(source, load_settings({"device": "cpu", "tuning_seconds": 7}))
    assert tuned == [(loaded, 7.0)]


def test_shapes_are_those_of_the_models_linears(model: LoadedModel) -> None:
    found = {(shape.out_features, shape.in_features, shape.gated) for shape in shapes_of(model)}
    spec = model.spec
    assert (spec.vocab_size, spec.hidden_size, False) in found
    assert (2 * spec.kv_size, spec.hidden_size, False) in found
    assert (2 * spec.intermediate_size, spec.hidden_size, True) in found
    assert {shape.dtype for shape in shapes_of(model)} == {torch.bfloat16}
