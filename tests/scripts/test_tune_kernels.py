"""The command and the section that search for fast launches, but for the search, which needs a GPU."""

import inspect
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from exeunt.calibration.options import CalibrationOptions
from exeunt.deploy import calibrate_command
from exeunt.kernels.linear_tiles import Tile
from exeunt.kernels.tuned.files import Finding, read_launches, write_launches
from exeunt.kernels.tuned.launches import TunedLaunch
from exeunt.kernels.tuned.shape import LinearShape
from scripts import tune_kernels
from scripts.gpu_check import tuning
from scripts.gpu_check.kernel_speeds import LAYERS
from scripts.gpu_check.models import GROUP_SIZE
from scripts.gpu_check.report import Clock, Context, Report
from scripts.gpu_check.table import table
from scripts.gpu_check.tuning import default_shapes, layer_shapes, model_shapes, parsed_shape
from tests.deploy.server_process import byte_bundle

ROOT = Path(__file__).resolve().parents[2]
GPU = "NVIDIA Q100"
FAST = TunedLaunch(Tile(8, 64, 4), split=True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU on which the first call of every search runs twice as fast as by the rule, and one with other bits."""
    pytest.importorskip("triton")
    from exeunt.kernels.tuned.search import Search

    def found(device: torch.device, shapes: Sequence[LinearShape], seconds: float) -> Search:
        findings = [
            Finding(shapes[0].key(1), FAST, 1e-5, 2e-5),
            Finding(shapes[1].key(1), None, 3e-5, 3e-5),
        ]
        return Search(findings, ["a tile"], ["another"], 4.0, 7 * len(shapes))

    monkeypatch.setattr("exeunt.kernels.tuned.trials.search_on", found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return torch.device("cuda")


def test_the_section_writes_launches_beside_its_report(tmp_path: Path, gpu: torch.device) -> None:
    context = Context(gpu, False, Report(tmp_path / "out.json"), Clock(45.0))
    found = context.report.section("tuning")
    tuning.run(context, found)
    path = tmp_path / "tuned-nvidia-q100.json"
    assert found["file"] == path.name
    assert (found["tried"], found["faster"], found["calls"]) == (2, 1, 7 * 2 * len(LAYERS))
    assert [line["speed_up"] for line in found["launches"]] == [2.0, 1.0]
    first, second = layer_shapes()[:2]
    assert read_launches(path, GPU) == {first.key(1): FAST, second.key(1): None}
    assert "2 of 112 calls, 1 faster than by the rule, at most 2.00 times as fast" in table(context.report)
    json.dumps(found)


def test_the_command_adds_to_what_the_file_has_of_this_gpu(tmp_path: Path, gpu: torch.device) -> None:
    path, other = tmp_path / "q100.json", LinearShape(64, 64, int4=True).key(8)
    int4, full = parsed_shape("4096x2048", 32)
    write_launches(path, GPU, [Finding(other, FAST, 1e-5, 2e-5), Finding(int4.key(1), None, 1e-5, 1e-5)])
    tune_kernels.main(shape=["4096x2048"], group_size=32, out=path)
    assert read_launches(path, GPU) == {other: FAST, int4.key(1): FAST, full.key(1): None}


@pytest.mark.parametrize("content", ["another GPU's", "spoilt"])
def test_the_command_leaves_a_file_alone_that_it_cannot_add_to(
    tmp_path: Path, gpu: torch.device, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path = tmp_path / "q100.json"
    write_launches(path, "NVIDIA T4", [Finding(LinearShape(64, 64, int4=True).key(8), FAST, 1e-5, 2e-5)])
    if content == "spoilt":
        path.write_text("spoilt")
    before = path.read_bytes()
    with pytest.raises(typer.Exit) as left:
        tune_kernels.main(shape=["4096x2048"], out=path)
    assert left.value.exit_code == 2
    assert f"Nothing can be added to {path}: it is " in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_bundle_says_the_size_of_its_groups(tmp_path: Path) -> None:
    folder = byte_bundle(tmp_path)
    own = json.loads((folder / "manifest.json").read_text())["int4_group_size"]
    assert {shape.group_size for shape in model_shapes(folder, 2 * own)} == {own}
    (folder / "manifest.json").unlink()  # a checkpoint
    assert {shape.group_size for shape in model_shapes(folder, 2 * own)} == {2 * own}


def test_there_is_nothing_to_tune_on_a_cpu(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    tuning.run(Context(torch.device("cpu"), True, Report(tmp_path / "out.json"), Clock(9.0)), found)
    assert found == {"skipped": ["there is nothing to tune without a GPU"]}
    done = subprocess.run(
        [sys.executable, "-m", "scripts.tune_kernels"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if not torch.cuda.is_available():
        assert done.returncode == 2
        assert "no CUDA device" in done.stderr


def test_the_layers_are_those_of_known_models() -> None:
    shapes = layer_shapes()
    assert len(shapes) == 2 * len(LAYERS)
    gated = {(shape.out_features, shape.in_features) for shape in shapes if shape.gated}
    assert gated == {LAYERS["mistral-7b gate_up"], LAYERS["llama-1.1b gate_up"]}
    packaged = set(default_shapes()) - set(shapes)
    assert {shape.int4 for shape in packaged} == {False, True}
    assert any(shape.gated for shape in packaged)


def test_int4_groups_are_those_that_a_calibration_makes() -> None:
    options = {field.name: field.default for field in fields(CalibrationOptions)}
    command = inspect.signature(calibrate_command.calibrate).parameters["group_size"].default
    assert GROUP_SIZE == options["group_size"] == command
    assert {shape.group_size for shape in default_shapes()} == {GROUP_SIZE}
    assert inspect.signature(tune_kernels.main).parameters["group_size"].default == GROUP_SIZE


def test_a_shape_is_read_in_both_formats() -> None:
    int4, full = parsed_shape("28672x4096:gated", 32)
    assert int4 == LinearShape(4096, 28672, int4=True, gated=True, group_size=32)
    assert full == LinearShape(4096, 28672, int4=False, gated=True, group_size=32)
    assert not parsed_shape("64x128", 64)[0].gated
    for wrong in ("64", "64x", "64x128:gate", "64 x 128"):
        with pytest.raises(ValueError, match="is no shape such as"):
            parsed_shape(wrong, 64)
