"""What an interrupted calibration has finished is there again, whole or not at all, and for that calibration alone."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exeunt.calibration.errors import CalibrationError
from exeunt.calibration.journal import FolderJournal, NoJournal, file_state, fingerprint_of

TENSORS = {"a": torch.arange(6).view(2, 3), "empty": torch.zeros(0, 4), "half": torch.ones(3).half()}
RECORD = {"loss": 0.1 + 0.2, "blocks": [1, None, "x"]}


def test_what_was_written_is_read_again_by_the_next_process(tmp_path: Path) -> None:
    first = FolderJournal(tmp_path / "work", "same")
    assert not first.resumed
    first.write("block-3", TENSORS, RECORD)
    first.close()  # as the end of a process does
    second = FolderJournal(tmp_path / "work", "same")
    found = second.read("block-3")
    assert second.resumed
    assert found is not None
    tensors, record = found
    assert record == RECORD
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert second.read("block-4") is None


def test_the_last_of_two_entries_of_a_name_counts(tmp_path: Path) -> None:
    journal = FolderJournal(tmp_path / "work", "same")
    journal.write("exit", {}, 1)
    journal.write("exit", {}, 2)
    assert journal.read("exit") == ({}, 2)


def test_another_calibration_s_work_is_removed(tmp_path: Path) -> None:
    one = FolderJournal(tmp_path / "work", "one")
    one.write("block-0", TENSORS, None)
    one.close()
    other = FolderJournal(tmp_path / "work", "other")
    assert not other.resumed
    assert other.read("block-0") is None
    other.close()
    assert FolderJournal(tmp_path / "work", "one").read("block-0") is None


def test_a_half_written_entry_is_as_good_as_none(tmp_path: Path) -> None:
    journal = FolderJournal(tmp_path / "work", "same")
    journal.write("block-0", TENSORS, RECORD)
    file = tmp_path / "work" / "block-0.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert journal.read("block-0") is None
    (tmp_path / "work" / "block-1.partial").write_bytes(b"x")  # what a kill in the middle of writing leaves
    journal.write("block-1", {}, 5)
    journal.close()
    assert FolderJournal(tmp_path / "work", "same").read("block-1") == ({}, 5)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "photos"
    mine.mkdir()
    (mine / "holiday.png").write_bytes(b"x")
    with pytest.raises(CalibrationError, match="holds something else than unfinished work"):
        FolderJournal(mine, "same")
    (mine / "fingerprint").write_text("same")
    with pytest.raises(CalibrationError, match="holds something else"):
        FolderJournal(mine, "another")
    assert (mine / "holiday.png").exists()


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibrationError, match=r"cannot be kept in .*not a directory.*--work none"):
        FolderJournal(tmp_path / "file" / "work", "same")


def test_an_altered_entry_is_as_good_as_none(tmp_path: Path) -> None:
    journal = FolderJournal(tmp_path / "work", "same")
    journal.write("block-0", TENSORS, RECORD)
    file = tmp_path / "work" / "block-0.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert journal.read("block-0") is None
    assert not file.exists(), "the step is done again"


def test_entries_of_another_calibration_are_not_read(tmp_path: Path) -> None:
    FolderJournal(tmp_path / "other", "other").write("block-0", TENSORS, RECORD)
    journal = FolderJournal(tmp_path / "work", "same")
    (tmp_path / "other" / "block-0.safetensors").rename(tmp_path / "work" / "block-0.safetensors")
    assert journal.read("block-0") is None


def test_two_processes_at_once_are_refused(tmp_path: Path) -> None:
    first = FolderJournal(tmp_path / "work", "same")
    words = (
        "import sys; from pathlib import Path; from exeunt.calibration.journal import FolderJournal; "
        "FolderJournal(Path(sys.argv[1]), 'same')"
    )
    command = [sys.executable, "-c", words, str(tmp_path / "work")]
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "Another calibration works in" in second.stderr
    first.close()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_what_is_not_its_own_stays(tmp_path: Path) -> None:
    journal = FolderJournal(tmp_path / "work", "same")
    (tmp_path / "work" / "bundle").mkdir()
    journal.remove()
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["bundle"]


def test_removed_at_the_end(tmp_path: Path) -> None:
    journal = FolderJournal(tmp_path / "work", "same")
    journal.write("block-0", TENSORS, None)
    (journal.scratch / "states-0").write_bytes(b"x")
    journal.remove()
    assert not (tmp_path / "work").exists()


def test_no_journal_remembers_nothing() -> None:
    journal = NoJournal()
    journal.write("block-0", TENSORS, None)
    assert journal.read("block-0") is None


def test_fingerprints_tell_parts_apart(tmp_path: Path) -> None:
    assert fingerprint_of(["ab", "c"]) != fingerprint_of(["a", "bc"])
    assert fingerprint_of(["ab", "c"]) == fingerprint_of(["ab", "c"])
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"1")
    before = file_state([file])
    file.write_bytes(b"12")
    assert file_state([file]) != before
