"""The temporary folder is gone at the end, and what a killed calibration left of its own goes at the next start."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from exeunt.calibration.errors import OptionError
from exeunt.calibration.scratch_folder import (
    check_bundle_can_stand,
    check_work_can_stand,
    remove_partial_bundles,
    scratch_folder,
)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def held(target: Path) -> subprocess.Popen[str]:
    """A process that has the scratch folder of `target` until it is killed."""
    code = f"""
        from pathlib import Path
        from exeunt.calibration.scratch_folder import scratch_folder
        with scratch_folder(Path({str(target)!r})) as folder:
            (folder / "states").write_text("x" * 1000)
            print(folder, flush=True)
            input()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert Path(process.stdout.readline().strip()).is_dir()
    return process


def test_it_is_gone_at_the_end(tmp_path: Path, temporary: Path) -> None:
    with scratch_folder(tmp_path / "b") as folder:
        (folder / "states").write_text("x")
        assert list(temporary.iterdir()) == [folder]
    with pytest.raises(KeyboardInterrupt), scratch_folder(tmp_path / "b"):
        raise KeyboardInterrupt
    assert not list(temporary.iterdir())


def test_what_a_killed_one_left_goes_and_what_a_living_one_has_stays(tmp_path: Path, temporary: Path) -> None:
    process = held(tmp_path / "b")
    try:
        with scratch_folder(tmp_path / "b"):
            assert len(list(temporary.iterdir())) == 2, "the other one lives"
        process.send_signal(signal.SIGKILL)
        process.wait()
        with scratch_folder(tmp_path / "other"):
            assert len(list(temporary.iterdir())) == 2, "it was another bundle's"
        with scratch_folder(tmp_path / "b") as folder:
            assert list(temporary.iterdir()) == [folder]
    finally:
        process.kill()
        process.communicate()


def old_folder(path: Path) -> Path:
    """A folder with a file, nothing written to either for years."""
    path.mkdir()
    (path / "weights.safetensors").write_text("x")
    for each in (path / "weights.safetensors", path):
        os.utime(each, (1.0, 1.0))
    return path


def test_a_partial_bundle_that_nobody_goes_on_with_is_removed(tmp_path: Path) -> None:
    left, other = (old_folder(tmp_path / f".{name}.partial-0011eeff") for name in "bc")
    (tmp_path / ".b.partial-2233eeff").mkdir()
    remove_partial_bundles(tmp_path / "b")
    assert not left.exists()
    assert other.exists()
    assert (tmp_path / ".b.partial-2233eeff").exists(), "someone may be writing there"


@pytest.mark.parametrize("name", ["*", "?", "[p]recious", "precious"])
def test_what_only_looks_like_a_partial_bundle_stays(tmp_path: Path, name: str) -> None:
    mine = old_folder(tmp_path / ".precious.partial-notes")
    theirs = old_folder(tmp_path / ".p.partial-0011eeff")
    remove_partial_bundles(tmp_path / name)
    assert mine.exists()
    assert theirs.exists()


def test_partial_bundles_are_looked_for_where_the_bundle_really_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    left = old_folder(tmp_path / ".real.partial-0011eeff")
    monkeypatch.chdir(tmp_path / "real")
    remove_partial_bundles(Path("."))
    assert not left.exists()


def test_whether_a_bundle_can_stand_is_tried_and_leaves_nothing(tmp_path: Path) -> None:
    check_bundle_can_stand(tmp_path / "new" / "folders" / "b")
    check_work_can_stand(tmp_path / "new" / "work")
    assert list(tmp_path.iterdir()) == [tmp_path / "tmp"]
    with pytest.raises(
        OptionError, match=r"no folder can be made there \(file name too long\); give another --out"
    ):
        check_bundle_can_stand(tmp_path / "new" / ("b" * 240))
    with pytest.raises(OptionError, match=r"too long\); give another --work"):
        check_work_can_stand(tmp_path / "new" / ("b" * 256))
    assert list(tmp_path.iterdir()) == [tmp_path / "tmp"]
