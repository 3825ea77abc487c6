"""Files that are no texts are refused, by name and line, and none is waited for."""

import os
from pathlib import Path

import pytest

from exeunt.calibration.documents import read_documents
from exeunt.calibration.errors import CorpusError


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (r'{"text": "half \ud800"}', r"line 2, is no text: character 5 of it is '\\ud800'"),
        ("[" * 100_000, "line 2, is nested too deeply"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "line 2, cannot be read .*digits"),
        ("{", "line 2, is not JSON"),
    ],
)
def test_lines_that_are_no_texts(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "words"}\n' + line + "\n")
    with pytest.raises(CorpusError, match=says) as caught:
        read_documents(str(path), None)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["X.JSONL", "x.NdJson"])
def test_endings_in_capitals(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "words"}\n')
    found = read_documents(str(tmp_path / name), None)
    assert found.rows
    assert found.texts == ["words"]


def test_texts_of_a_folder_may_end_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "a.TXT").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    assert read_documents(str(tmp_path), None).texts == ["one", "two"]


@pytest.mark.parametrize("name", ["x.json", "X.JSON"])
def test_json_is_not_taken_for_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('[{"text": "words"}]')
    with pytest.raises(CorpusError, match=r"is a JSON file; give JSON Lines"):
        read_documents(str(tmp_path / name), None)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this platform has no named pipes (mkfifo)")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    os.mkfifo(tmp_path / "b.txt")
    for data in (tmp_path, tmp_path / "b.txt"):
        with pytest.raises(CorpusError, match=r"b\.txt is no regular file"):
            read_documents(str(data), None)


def test_links_to_texts_are_read_and_links_to_nothing_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "words").write_text("words")
    (folder / "a.txt").symlink_to(tmp_path / "words")
    assert read_documents(str(folder), None).texts == ["words"]
    (folder / "b.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(CorpusError, match=r"b\.txt is no regular file"):
        read_documents(str(folder), None)
