"""The temporary folder is gone at the end, and what a killed calibration left of its own goes at the next start."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from exeunt.calibration.scratch_folder import remove_partial_bundles, scratch_folder


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


def test_a_partial_bundle_that_nobody_goes_on_with_is_removed(tmp_path: Path) -> None:
    names = (".b.partial-00ff", ".b.partial-11ff", ".c.partial-00ff")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_text("x")
    for name in (names[0], names[2]):
        for path in (tmp_path / name / "weights.safetensors", tmp_path / name):
            os.utime(path, (1.0, 1.0))
    remove_partial_bundles(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.glob(".*")) == [names[1], names[2]]
