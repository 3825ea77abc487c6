"""What a calibration costs: that memory is really watched, that sums are right, and lines through what is measured."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from exeunt.calibration.memory_plan import batch_token_bytes, block_bytes, full_batch_tokens
from exeunt.calibration.weight_check import check_weights
from exeunt.compression.checkpoint import open_checkpoint
from exeunt.compression.checkpoint_names import linear_names
from exeunt.compression.tokenizer import load_tokenizer
from exeunt.deploy import packaged_model
from exeunt.kernels.int4_linear import quantize
from scripts.bench_calibration import __main__ as command
from scripts.bench_calibration.arithmetic import SHAPES, int4_bytes, needs
from scripts.bench_calibration.point import STATUS, Point
from scripts.bench_calibration.random_model import Size, write_model

GIB = 2**30
MIB = 2**20


def test_a_random_model_is_a_checkpoint_that_the_packaged_text_can_be_read_with(tmp_path: Path) -> None:
    size = Size(hidden=64, inner=96, blocks=3, heads=4)
    checkpoint = open_checkpoint(write_model(size, tmp_path / "model"))
    check_weights(checkpoint.weights(), checkpoint.spec)
    assert (checkpoint.spec.blocks, checkpoint.spec.kv_heads, checkpoint.spec.tied) == (3, 1, False)
    assert len(checkpoint.files) == 4
    ids = load_tokenizer(checkpoint.directory)("Once upon a time").input_ids
    assert max(ids) < checkpoint.spec.vocab_size
    again = open_checkpoint(write_model(size, tmp_path / "again"))
    for one, other in zip(checkpoint.files, again.files, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_int4_bytes_are_those_of_real_int4_weights(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(
        write_model(Size(hidden=48, inner=100, blocks=2, heads=4), tmp_path / "model")
    )
    weights, spec = checkpoint.weights(), checkpoint.spec
    matrices = [weights.block(block)[f"{name}.weight"] for block in range(2) for name in linear_names(spec)]
    matrices.append(weights.shared()["output.weight"])
    assert int4_bytes(spec) == sum(quantize(matrix, 32).nbytes for matrix in matrices)


def test_what_a_7b_and_a_70b_model_need() -> None:
    assert needs(SHAPES["Mistral-7B"], torch.float32).peak < 24 * GIB
    assert needs(SHAPES["Llama-70B"], torch.bfloat16).peak < 80 * GIB
    assert SHAPES["Mistral-7B"].parameters == pytest.approx(7.24e9, rel=0.01)
    assert SHAPES["Llama-70B"].parameters == pytest.approx(70.6e9, rel=0.01)


def test_more_blocks_need_their_int4_weights_and_a_batchs_keys_and_values_alone() -> None:
    spec = SHAPES["Mistral-7B"]
    deeper = replace(spec, blocks=2 * spec.blocks)
    less, more = (needs(each, torch.float32) for each in (spec, deeper))
    assert sum(more.held.values()) - sum(less.held.values()) == int4_bytes(deeper) - int4_bytes(spec)
    for phase, parts in more.phases.items():
        for name, size in parts.items():
            assert name == "a batch" or size == less.phases[phase][name]
    tokens = [full_batch_tokens(each, torch.float32, 4096) for each in (spec, deeper)]
    bytes_each = [batch_token_bytes(each, torch.float32) for each in (spec, deeper)]
    for need, count, size in zip((less, more), tokens, bytes_each, strict=True):
        assert need.phases["certifying, full weights"]["a batch"] == count * size


def test_comparing_roundings_holds_two_blocks_and_the_output_matrix_thrice() -> None:
    spec = SHAPES["Mistral-7B"]
    found = needs(spec, torch.float32, study_tokens=1_000)
    blocks, output = (found.phases[f"comparing roundings, {part}"] for part in ("blocks", "output matrix"))
    assert (
        blocks["one full block"]
        == blocks["another restored from four bits"]
        == block_bytes(spec, torch.float32)
    )
    assert blocks["every form's states"] == 4 * 1_000 * spec.hidden_size * 4
    assert blocks["second moments"] == found.phases["quantising"]["second moments"]
    assert blocks["a batch"] < 1_000 * batch_token_bytes(spec, torch.float32) / 2  # of one block at a time
    matrix = spec.vocab_size * spec.hidden_size
    assert output["held against each other"] == 3 * 4 * matrix
    assert output["the matrix again, and restored"] == 2 * 4 * matrix


def test_a_line_is_found_and_what_lies_off_it_told() -> None:
    rows = [{"tokens": tokens, "seconds": 5.0 + 0.002 * tokens} for tokens in (1000, 2000, 4000)]
    fit = command.line_through(rows)
    assert fit["seconds_at_none"] == pytest.approx(5.0)
    assert fit["seconds_per_1000_tokens"] == pytest.approx(2.0)
    assert fit["worst_deviation"] < 1e-9
    bent = [{"tokens": tokens, "seconds": 1e-6 * tokens**2} for tokens in (1000, 2000, 4000)]
    assert command.line_through(bent)["worst_deviation"] > 0.2


def test_growth_is_that_of_the_peak_beyond_the_beginning() -> None:
    def row(blocks: int, before: int) -> dict[str, Any]:
        peak = before + 700 + 40 * blocks
        return {
            "full_bytes": 256 * blocks,
            "int4_bytes": 40 * blocks,
            "peak": {"anonymous": peak},
            "before": {"anonymous": before},
        }

    growth = command.memory_growth([row(1, 0), row(10, 5), row(20, 9)])
    assert growth == pytest.approx({"per_full_byte": 40 / 256, "per_int4_byte": 1.0})


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's account of a process's memory")
def test_the_memory_of_every_phase_is_seen() -> None:
    watched = [sys.executable, "-m", "tests.scripts.watched_calibration"]
    said = subprocess.run(watched, cwd=command.ROOT, capture_output=True, text=True, check=True, timeout=120)
    told = json.loads(said.stdout)
    assert told["options"] == [3000, True, 512]
    assert told["work"]
    assert told["quick"]
    found = told["found"]
    peaks = {each["phase"]: each["peak"]["anonymous"] for each in found["phases"]}
    named = ("Small", "after small", "Large", "after large", "Small again", "after small again")
    assert tuple(peaks) == ("beginning", *named)
    start = found["before"]["anonymous"]
    assert peaks["Small"] - start < 32 * MIB
    assert 60 * MIB < peaks["Large"] - start < 100 * MIB
    assert command.anonymous(found) == peaks["Large"] - start
    assert peaks["Small again"] - start < 32 * MIB
    assert (
        found["peak_resident_by_kernel"] > 0.9 * found["peak"]["resident"] > 0
    )  # its sums are rounded by thread
    assert found["bundle_bytes"] == 4


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Point]]:
    """The points that are run; their processes say that a byte of weights takes a byte, and a token a millisecond."""
    seen: list[Point] = []

    def run(wanted: Point, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
        assert (environment is not None) == wanted.journal  # where memory is measured
        seen.append(wanted)
        kinds = dict.fromkeys(("anonymous", "mapped_files", "shared", "resident"), 0)
        size = open_checkpoint(wanted.model).spec.parameters
        peak = kinds | {"anonymous": size, "resident": 2 * size}
        phases = [{"phase": "Quantising weights", "seconds": 1.0, "peak": peak}]
        return {"seconds": wanted.tokens / 1000, "before": kinds, "peak": peak, "phases": phases}

    monkeypatch.setattr(command, "run_point", run)
    return lambda: seen


def test_a_quick_run_measures_and_writes_only_where_it_is_told(
    recorded: Callable[[], list[Point]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results.json")
    command.main(quick=True)
    assert not list(tmp_path.iterdir())
    command.main(tmp_path / "out.json", quick=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    points = recorded()[len(recorded()) // 2 :]
    grown, timed = points[:2], points[2:]
    assert all(each.stream_weights is True and each.journal for each in grown)
    assert {each.model for each in timed} == {str(packaged_model.path())}
    assert [each.tokens for each in timed] == list(command.QUICK.tokens)


def test_one_part_is_measured_anew_and_the_other_kept(
    recorded: Callable[[], list[Point]], tmp_path: Path
) -> None:
    path = tmp_path / "out.json"
    command.main(path, quick=True)
    before, points = json.loads(path.read_text()), len(recorded())
    before["memory"][0]["marked"] = True
    path.write_text(json.dumps(before))
    command.main(path, quick=True, only=command.Part.TIME)
    assert {each.model for each in recorded()[points:]} == {str(packaged_model.path())}
    assert json.loads(path.read_text()) == before


def test_a_part_is_kept_only_from_a_measurement_alike(
    recorded: Callable[[], list[Point]], tmp_path: Path
) -> None:
    path = tmp_path / "out.json"
    with pytest.raises(typer.BadParameter, match="no JSON"):
        command.main(path, quick=True, only=command.Part.TIME)
    command.main(path, quick=True)
    points = len(recorded())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": {}}))
    with pytest.raises(typer.BadParameter, match="other settings"):
        command.main(path, quick=True, only=command.Part.MEMORY)
    assert len(recorded()) == points
