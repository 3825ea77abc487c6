"""The same seed gives the same bytes, interrupted or not; an interrupt leaves nothing behind that was not asked for."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from exeunt.calibration.options import CalibrationOptions
from exeunt.calibration.pipeline import calibrate
from tests.calibration.silent_progress import SilentProgress
from tests.calibration.tiny_calibration import Watched, options


@dataclass(frozen=True, slots=True)
class Whole:
    """A calibration that nothing interrupted, with the environment in which another makes the same bytes."""

    asked: CalibrationOptions
    environment: dict[str, str]


@pytest.fixture(scope="module")
def whole(checkpoint: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    environment = {"SOURCE_DATE_EPOCH": "1700000000", "XDG_CACHE_HOME": str(folder / "cache")}
    asked = replace(options(checkpoint, text_file, folder / "bundle"), costs="remembered", work=None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests: other threads, other bytes
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        calibrate(asked, SilentProgress())
    torch.set_num_threads(threads)
    return Whole(asked, environment)


def test_the_same_seed_gives_the_same_bytes(
    checkpoint: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = replace(
        options(checkpoint, text_file, tmp_path / "once"),
        exits="auto",
        drafting_exit="auto",
        costs="remembered",
    )
    once = calibrate(asked, SilentProgress())
    again = calibrate(replace(asked, out=tmp_path / "again"), SilentProgress())
    for path in sorted(once.iterdir()):
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    "phase",
    [
        "Checking the weights",
        "Quantising weights, collecting activations",
        "Evaluating every mode",
        "Writing the bundle",
    ],
)
def test_an_interrupt_leaves_nothing(
    checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with pytest.raises(KeyboardInterrupt):
        calibrate(options(checkpoint, text_file, tmp_path / "out" / "bundle"), Watched(stop_in=phase))
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    assert not list(scratch.iterdir())


@pytest.mark.parametrize(
    "phase",
    [
        "Quantising weights, collecting activations",
        "Training exit heads",
        "Training exit gates",
        "Certifying thresholds",
        "Evaluating every mode",
        "Writing the bundle",
    ],
)
def test_an_interrupted_calibration_goes_on_to_the_same_bytes(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    for name, value in whole.environment.items():
        monkeypatch.setenv(name, value)
    work = tmp_path / "work"
    asked = replace(whole.asked, out=tmp_path / "bundle", work=work)
    with pytest.raises(KeyboardInterrupt):
        calibrate(asked, Watched(stop_in=phase))
    assert not (tmp_path / "bundle").exists()
    assert work.is_dir()
    progress = Watched()
    resumed = calibrate(asked, progress)
    goes_on = any(note.startswith("Going on from the unfinished work") for note in progress.notes)
    assert goes_on == (phase != "Quantising weights, collecting activations"), "no block was finished there"
    assert not work.exists()
    for path in sorted(whole.asked.out.iterdir()):
        assert (resumed / path.name).read_bytes() == path.read_bytes(), path.name
