"""The packaged model's bundle: made on first use, kept by content, made anew when it is spoilt."""

import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from exeunt.calibration.options import CalibrationOptions
from exeunt.calibration.progress import TerminalProgress
from exeunt.compression.model import load_bundle
from exeunt.deploy import packaged_model
from exeunt.deploy.bench_engine import EngineDriver, engine_driver
from exeunt.deploy.bench_load import Load
from exeunt.deploy.bundle_cache import KEPT_DAYS, alone, lock_of
from exeunt.deploy.loading import SettingsError
from exeunt.deploy.packaged import (
    cache_folder,
    content_key,
    packaged_bundle,
)
from exeunt.deploy.packaged_model import CALIBRATION_TEXT
from tests.compression.small_bundles import small_bundle, small_checkpoint


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = small_checkpoint(tmp_path / "model")
    (folder / CALIBRATION_TEXT).write_text("some text")
    monkeypatch.setattr(packaged_model, "path", lambda: folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def made(model: Path, monkeypatch: pytest.MonkeyPatch) -> list[CalibrationOptions]:
    """The calibrations that were asked for; each is answered with a small bundle at once."""
    asked: list[CalibrationOptions] = []

    def calibrate(options: CalibrationOptions, progress: object) -> Path:
        asked.append(options)
        return small_bundle(options.out, Path(options.model)).path

    monkeypatch.setattr("exeunt.calibration.pipeline.calibrate", calibrate)
    return asked


def test_the_bundle_is_made_once(model: Path, made: list[CalibrationOptions]) -> None:
    first = packaged_bundle()
    assert packaged_bundle() == first
    assert len(made) == 1
    assert first.is_relative_to(cache_folder())
    assert made[0].data == str(model / CALIBRATION_TEXT)
    assert made[0].model == str(model)


def test_another_content_is_another_bundle(model: Path, made: list[CalibrationOptions]) -> None:
    before = packaged_bundle()
    (model / CALIBRATION_TEXT).write_text("same size")
    assert packaged_bundle() != before
    assert len(made) == 2


def age(path: Path, days: float) -> None:
    then = time.time() - 86400 * days
    for each in (path, path.with_name(f"{path.name}.lock")):
        if each.exists():
            os.utime(each, (then, then))


def test_a_superseded_bundle_stays_while_it_is_opened(model: Path, made: list[CalibrationOptions]) -> None:
    """Two versions may take turns, and a process may be about to load what it was told of."""
    text = (model / CALIBRATION_TEXT).read_text()
    old = packaged_bundle()
    age(old, KEPT_DAYS + 1)
    assert packaged_bundle() == old  # opened today
    (model / CALIBRATION_TEXT).write_text("another")
    packaged_bundle()
    (model / CALIBRATION_TEXT).write_text(text)
    assert packaged_bundle() == old
    assert len(made) == 2


def test_the_bundles_that_the_new_one_supersedes_go(
    model: Path, made: list[CalibrationOptions], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "exeunt.packaged")
    old = packaged_bundle()
    age(old, KEPT_DAYS + 1)
    folder = old.parent
    others = [folder / name for name in ("packaged-mine", "packaged-0123456789abcdeF", "of-my-own")]
    for other in others:
        other.mkdir()
    locked, lock_alone = folder / f"packaged-{'a' * 16}", folder / f"packaged-{'b' * 16}.lock"
    locked.mkdir()
    lock_alone.touch()
    age(lock_alone.with_suffix(""), KEPT_DAYS + 1)
    age(locked, KEPT_DAYS + 1)
    (model / CALIBRATION_TEXT).write_text("another")
    with locked.with_name(f"{locked.name}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        age(locked, KEPT_DAYS + 1)
        new = packaged_bundle()
    kept = {new, new.with_name(f"{new.name}.lock"), locked, Path(held.name), *others}
    assert set(folder.iterdir()) == kept
    assert f"Removed {old}" in caplog.text
    assert packaged_bundle() == new


def test_nothing_is_removed_for_a_bundle_that_was_not_made(
    model: Path, made: list[CalibrationOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = packaged_bundle()
    (model / CALIBRATION_TEXT).write_text("another")

    def fail(options: CalibrationOptions, progress: object) -> Path:
        raise RuntimeError("no")

    monkeypatch.setattr("exeunt.calibration.pipeline.calibrate", fail)
    with pytest.raises(RuntimeError):
        packaged_bundle()
    assert old.is_dir()


def test_a_lock_that_is_removed_while_it_is_waited_for_is_asked_for_anew(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    lock = lock_of(bundle)
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def removed() -> None:
            lock.unlink(missing_ok=True)
            other.close()

        with (
            alone(bundle, TerminalProgress(), removed),
            lock.open("a") as again,
            pytest.raises(BlockingIOError),
        ):
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_model_outlives_the_folder_it_was_loaded_from(tmp_path: Path) -> None:
    """So a server goes on where a newer one has removed its bundle."""
    checkpoint = small_checkpoint(tmp_path / "checkpoint")
    bundle = small_bundle(tmp_path / "bundle", checkpoint).path
    load = Load(concurrency=1, prompt_tokens=4, max_new_tokens=3, requests=1)

    def answers(driver: EngineDriver) -> list[list[int]]:
        compressions = [{"weights": weights, "early_exit": False} for weights in ("int4", "full")]
        return [driver.run([[1, 2, 3]], compression, load)[0].ids for compression in compressions]

    driver = engine_driver(load_bundle(bundle), load)
    try:
        before = answers(driver)
    finally:
        driver.close()
    driver = engine_driver(load_bundle(bundle), load)
    shutil.rmtree(bundle)
    try:
        assert answers(driver) == before
    finally:
        driver.close()


def test_what_the_bundle_is_made_from_makes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", CALIBRATION_TEXT, "MODEL_CARD.md"):
        (tmp_path / name).write_text("as it was")
    keys = [content_key(tmp_path)]
    (tmp_path / "MODEL_CARD.md").write_text("a word mended")
    assert content_key(tmp_path) == keys[0]
    for name in ("model.safetensors", "tokenizer.json", CALIBRATION_TEXT):
        (tmp_path / name).write_text("another")
        keys.append(content_key(tmp_path))
    monkeypatch.setattr("exeunt.calibration.sources.LAYERS", ("exeunt.kernels",))
    keys.append(content_key(tmp_path))
    assert len(set(keys)) == 5


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize("spoil", [cut, Path.unlink])
def test_a_spoilt_bundle_is_made_anew(
    made: list[CalibrationOptions], spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    spoil(packaged_bundle() / "weights.int4.safetensors")
    assert packaged_bundle().is_dir()
    assert len(made) == 2
    assert "made anew" in caplog.text


def test_a_calibration_is_told_of_and_made_as_asked(made: list[CalibrationOptions]) -> None:
    told: list[int] = []
    for _ in range(2):
        packaged_bundle(device="cpu", on_calibration=lambda: told.append(len(made)))
    assert told == [0], "before it begins, and only then"
    assert made[0].device == "cpu"


def test_the_first_start_evaluates_every_mode_on_less_text(
    model: Path, made: list[CalibrationOptions], tmp_path: Path
) -> None:
    packaged_bundle()
    usual = CalibrationOptions(model=str(model), out=tmp_path, data="x")
    assert made[0].evaluation_tokens < usual.evaluation_tokens
    same = ("tokens", "exits", "linear_block", "weights", "kv_cache", "targets", "confidence", "seed")
    assert [getattr(made[0], name) for name in same] == [getattr(usual, name) for name in same]


def test_a_cache_that_cannot_be_written_is_known_before_the_work(
    made: list[CalibrationOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(SettingsError, match=r"cannot be kept in .*not a directory; set XDG_CACHE_HOME"):
        packaged_bundle()
    assert made == []


@pytest.mark.parametrize("succeeds", [True, False])
def test_one_process_calibrates_and_the_others_wait_for_it(
    model: Path, made: list[CalibrationOptions], succeeds: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    target = cache_folder() / "bundles" / f"packaged-{content_key(model)}"
    target.parent.mkdir(parents=True)
    told: list[str] = []
    with target.with_name(f"{target.name}.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def while_waiting() -> None:
            told.append("waits")
            if len(told) == 2:
                if succeeds:
                    small_bundle(target, model)
                other.close()  # as when that process ends, however it does

        bundle = packaged_bundle(
            on_calibration=lambda: told.append("calibrates"), while_waiting=while_waiting
        )
    assert bundle == target
    assert told == ["waits", "waits"] + ([] if succeeds else ["calibrates"])
    assert len(made) == (0 if succeeds else 1)
    assert capsys.readouterr().err.count("Another process is calibrating") == 1


def test_a_bundle_that_another_process_has_just_made_is_kept(
    model: Path, made: list[CalibrationOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = cache_folder() / "bundles" / f"packaged-{content_key(model)}"
    lock = fcntl.flock

    def late(file: int, how: int) -> None:
        small_bundle(target, model)  # between the first look and the lock
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert packaged_bundle() == target
    assert made == []


def test_where_files_cannot_be_locked_it_is_calibrated_all_the_same(
    made: list[CalibrationOptions], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert packaged_bundle().is_dir()
    assert len(made) == 1
    assert "No locks available" in caplog.text
