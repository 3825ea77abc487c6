"""The file of `--json`: refused before the work where it cannot be written, written after it."""

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from exeunt.deploy.arguments import UsageError
from exeunt.deploy.json_file import JSONFile, JSONFileError


def test_it_is_written_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("older")
    JSONFile.checked(path)
    assert path.read_text() == "older", "looking changes nothing"
    JSONFile.checked(path).write({"a": [1, "ü"]})
    assert json.loads(path.read_text()) == {"a": [1, "ü"]}
    assert path.read_text().endswith("\n")
    assert list(tmp_path.iterdir()) == [path]
    new = tmp_path / "new.json"
    JSONFile.checked(new).write(1)
    umask = os.umask(0o22)
    os.umask(umask)
    assert stat.S_IMODE(new.stat().st_mode) == 0o666 & ~umask


def test_a_new_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write_bytes(path, data[: len(data) // 2])
        seen.append((tmp_path / "result.json").exists())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(JSONFileError, match="no space left on device"):
        JSONFile.checked(tmp_path / "result.json").write({"a": 1})
    assert seen == [False]
    assert list(tmp_path.iterdir()) == []


def test_a_file_keeps_its_mode_and_its_names(tmp_path: Path) -> None:
    path, other = tmp_path / "result.json", tmp_path / "other.json"
    path.write_text("older, and longer than what follows")
    path.chmod(0o600)
    other.hardlink_to(path)
    JSONFile.checked(path).write(1)
    assert other.read_text() == "1\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_standard_output_keeps_what_is_in_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    code = "from exeunt.deploy.json_file import *; JSONFile.checked(Path('/dev/stdout')).write('\\udcff')"
    with log.open("a") as stdout:
        subprocess.run([sys.executable, "-c", code], stdout=stdout, check=True, timeout=60)
    assert log.read_text() == 'before\n"\\udcff"\n'


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("older")
    link = tmp_path / "link.json"
    link.symlink_to("real.json")
    JSONFile.checked(link).write(2)
    assert link.is_symlink()
    assert (tmp_path / "real.json").read_text() == "2\n"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/result.json", "no such file or directory"),
        ("file/result.json", "not a directory"),
        ("folder", "it is a folder"),
        ("n" * 300, "name too long"),
    ],
)
def test_what_cannot_be_written_is_known_beforehand(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        UsageError, match=rf"--json is .*, which cannot be written: .*{reason}.*; give a file"
    ):
        JSONFile.checked(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_file_that_may_not_be_written_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    path.write_text("kept")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everything
    with pytest.raises(UsageError, match="it may not be written"):
        JSONFile.checked(path)


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    JSONFile.checked(pipe).write([3])
    reader.join(10)
    assert json.loads(read[0]) == [3]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_models_folder_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "bundle"
    (bundle / "deep").mkdir(parents=True)
    manifest = bundle / "manifest.json"
    manifest.write_text("kept")
    (tmp_path / "link").symlink_to(bundle)
    (tmp_path / "file").symlink_to(manifest)
    (tmp_path / "hard").hardlink_to(manifest)
    monkeypatch.chdir(tmp_path)
    for model in ("bundle", "bundle/", bundle, "link"):
        for path in (
            "bundle/manifest.json",
            "link/new.json",
            "bundle/deep/x.json",
            "file",
            "hard",
            "./bundle/x",
        ):
            with pytest.raises(
                UsageError, match=r"--json is .*, which is in the model's folder .*; give a file"
            ):
                JSONFile.checked(Path(path), model=model)
    assert manifest.read_text() == "kept"
    assert list((bundle / "deep").iterdir()) == []
    for model in ("bundle", "owner/name", "http://127.0.0.1:1"):
        JSONFile.checked(Path("bundle.json"), model=model)


def test_the_text_that_is_read_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "texts" / "t.txt"
    text.parent.mkdir()
    text.write_text("kept")
    (tmp_path / "link").symlink_to(text)
    for path, data in (
        ("texts/t.txt", "texts/t.txt"),
        ("link", str(text)),
        (str(text), "link"),
        ("texts/t.txt", "texts"),
        ("texts/new.txt", "texts"),
    ):
        with pytest.raises(
            UsageError, match=r"--json is .*, which is one of the texts of --data .*; give another"
        ):
            JSONFile.checked(Path(path), data=data)
    assert text.read_text() == "kept"
    for path, data in (
        ("texts/result.json", "texts"),
        ("t.json", "hf:owner/name"),
        ("t.json", "texts/t.txt"),
    ):
        JSONFile.checked(Path(path), data=data)
    JSONFile.checked(Path("/dev/stdout"), data="/dev/stdin")
