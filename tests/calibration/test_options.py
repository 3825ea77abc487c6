"""What cannot be calibrated is refused in one sentence, before any work and with nothing written."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exeunt.calibration.errors import CalibrationError, CorpusError, OptionError
from exeunt.calibration.evaluate import EvaluationOptions
from exeunt.calibration.option_limits import MOST_SEED
from exeunt.calibration.options import (
    CalibrationOptions,
    drafting_blocks,
    exit_blocks,
    resolve_device,
    work_place,
)
from exeunt.calibration.pipeline import calibrate
from exeunt.calibration.weights_int4 import check_group_size
from exeunt.compression.bundle import BundleError
from exeunt.compression.checkpoint import CheckpointError
from exeunt.compression.decoder import Decoder
from tests.calibration.silent_progress import SilentProgress
from tests.calibration.tiny_calibration import options


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"exits": (0, 3)}, CalibrationError, "no exit after block 3"),
        ({"exits": (-1,)}, CalibrationError, "no exit after block -1"),
        ({"drafting_exit": 3}, CalibrationError, "no exit after block 3"),
        ({"linear_block": 4}, CalibrationError, "no block 4"),
        ({"data": "/nowhere/text.txt"}, CorpusError, "neither a file nor a folder"),
        ({"model": "/nowhere/model"}, CheckpointError, "neither a checkpoint directory"),
        ({"least_tokens": 50_000, "tokens": 60_000}, CorpusError, "at least 50,000"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    checkpoint: Path,
    text_file: Path,
    tmp_path: Path,
    change: dict[str, object],
    error: type[Exception],
    says: str,
) -> None:
    asked = replace(options(checkpoint, text_file, tmp_path / "b"), **change)  # type: ignore[arg-type]
    with pytest.raises(error, match=says):
        calibrate(asked, SilentProgress())
    assert not (tmp_path / "b").exists()


def test_a_folder_that_is_no_bundle_is_not_overwritten(
    checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(BundleError, match="not a bundle"):
        calibrate(options(checkpoint, text_file, tmp_path), SilentProgress())
    assert (tmp_path / "mine").read_text() == "keep"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"risk": (0.0,)}, "risk target 0"),
        ({"risk": ()}, "at least one risk target"),
        ({"confidence": 1.0}, "confidence is 1"),
        ({"tokens": 10}, "--tokens is 10; a calibration needs at least"),
        ({"row_tokens": 4}, "at least 16"),
        ({"group_size": 7}, "group size is 7"),
    ],
)
def test_options_are_checked(change: dict[str, object], says: str) -> None:
    with pytest.raises(CalibrationError, match=says):
        CalibrationOptions(model="m", out=Path("o"), data="d", **change)  # type: ignore[arg-type]


def test_exits_may_stand_behind_every_block_but_the_last(decoder: Decoder) -> None:
    spec = decoder.spec
    assert exit_blocks(replace(spec, blocks=5), "auto") == (0, 1, 2, 3)
    assert exit_blocks(replace(spec, blocks=1), "auto") == ()
    assert exit_blocks(spec, (2, 0, 2)) == (0, 2)
    assert drafting_blocks(spec, "auto") == (0, 1, 2)
    assert drafting_blocks(spec, "none") == ()
    assert drafting_blocks(spec, 1) == (1,)
    assert drafting_blocks(replace(spec, blocks=1), "auto") == ()


def test_devices_are_checked() -> None:
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(CalibrationError, match="'toaster'"):
        resolve_device("toaster")


@pytest.mark.parametrize("seed", [-1, 2**31, 18446744073709551616])
def test_seeds_that_could_not_be_drawn_from(seed: int) -> None:
    with pytest.raises(OptionError, match=f"The seed is {seed}; give a whole number from 0 to 2147483647"):
        CalibrationOptions(model="m", out=Path("o"), data="d", seed=seed)
    with pytest.raises(OptionError, match=f"The seed is {seed}"):
        EvaluationOptions(seed=seed)


def test_the_largest_seed_can_be_drawn_from() -> None:
    assert CalibrationOptions(model="m", out=Path("o"), data="d", seed=MOST_SEED).seed == MOST_SEED
    torch.Generator().manual_seed((MOST_SEED * 1000 + 999) * 2 + 1)  # as `exit_fit` numbers its draws


def test_unfinished_work_of_a_bundle_named_by_a_dot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    assert work_place(CalibrationOptions(model="m", out=Path("."), data="d")) == tmp_path / ".b.unfinished"


def test_groups_larger_than_any_layer(decoder: Decoder) -> None:
    check_group_size(decoder.spec, 48)
    with pytest.raises(
        OptionError, match="group size is 50, and no layer of the model has more than 48 inputs"
    ):
        check_group_size(decoder.spec, 50)


def test_windows_are_checked_before_weights_are_read(checkpoint: Path) -> None:
    EvaluationOptions(window=96).check_for(checkpoint)
    for asked in (EvaluationOptions(window=97), EvaluationOptions(stride=97)):
        with pytest.raises(OptionError, match="96"):
            asked.check_for(checkpoint)
