"""Unfinished work of another model, or of other tokens, is not gone on with, however alike the files look."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exeunt.calibration.checkpoint_contents import SAMPLE_BYTES, SAMPLES, checkpoint_contents, weights_sample
from exeunt.calibration.corpus import Splits
from exeunt.calibration.fingerprint import calibration_fingerprint
from exeunt.calibration.pipeline import calibrate
from exeunt.compression.checkpoint import open_checkpoint
from tests.calibration.tiny_calibration import Watched, options

INTERRUPTED = "Training exit heads"


def _blank_behind(name: str) -> Callable[[Path], None]:
    """A change of the file `name` that changes nothing that is read from it."""

    def change(model: Path) -> None:
        path = model / name
        path.write_text(path.read_text() + "\n")

    return change


def _other_rope(model: Path) -> None:
    path = model / "config.json"
    text = path.read_text()
    assert "10000" in text
    path.write_text(text.replace("10000", "20000", 1))


def _other_weights(model: Path) -> None:
    """As many bytes, changed at the same time to the nanosecond."""
    path = model / "model.safetensors"
    state, data = path.stat(), bytearray(path.read_bytes())
    data[-4096:] = data[-8192:-4096]
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def _nothing(_model: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "goes_on"),
    [
        (_nothing, True),
        (_other_rope, False),
        (_blank_behind("generation_config.json"), False),
        (_blank_behind("tokenizer.json"), False),
        (_blank_behind("tokenizer_config.json"), False),
        (_other_weights, False),
    ],
)
def test_a_resumed_calibration_notices_another_model(
    checkpoint: Path, text_file: Path, tmp_path: Path, change: Callable[[Path], None], goes_on: bool
) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "model")
    asked = replace(options(model, text_file, tmp_path / "bundle"), work=tmp_path / "work")
    with pytest.raises(KeyboardInterrupt):
        calibrate(asked, Watched(stop_in=INTERRUPTED))
    change(model)
    progress = Watched(stop_in=INTERRUPTED)
    with pytest.raises(KeyboardInterrupt):
        calibrate(asked, progress)
    assert any(note.startswith("Going on from") for note in progress.notes) == goes_on


def test_other_tokens_of_the_same_text_are_another_calibration(
    checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    asked, model = options(checkpoint, text_file, tmp_path / "b"), open_checkpoint(str(checkpoint))

    def found(*fit: list[int]) -> str:
        rows = tuple(torch.tensor(row) for row in fit)
        return calibration_fingerprint(asked, model, "0", Splits(rows, (), ()))

    assert found([1, 2, 3]) == found([1, 2, 3])
    assert found([1, 2, 3]) != found([1, 2, 4])
    assert found([1, 2, 3]) != found([1, 2], [3])


def test_a_sample_covers_a_small_file_and_is_spread_over_a_large_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = b"{}      "
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(SAMPLES * SAMPLE_BYTES // 2))
    seen = {weights_sample(path)}
    for place in (9, 16, 5000, 70_001, path.stat().st_size - 1):
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        seen.add(weights_sample(path))
    assert len(seen) == 6
    with path.open("r+b") as file:
        file.truncate(2**31)  # holes: large, and takes no place
    large = weights_sample(path)
    with path.open("r+b") as file:
        file.seek(2**30)
        file.write(b"x" * 2**26)
    assert weights_sample(path) != large


def test_contents_are_a_line_a_file(checkpoint: Path) -> None:
    names = [line.split()[0] for line in checkpoint_contents(open_checkpoint(str(checkpoint)))]
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= set(names)
    assert len(names) == len(set(names))
