"""Arrays of hidden states have their place on the disk before anything is written to them."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch

from exeunt.calibration.activations import Scratch
from exeunt.calibration.errors import CalibrationError

needs_reservation = pytest.mark.skipif(
    not hasattr(os, "posix_fallocate"),
    reason="this platform cannot reserve disk space for a file (posix_fallocate)",
)


@needs_reservation
def test_the_whole_array_is_on_the_disk(tmp_path: Path) -> None:
    Scratch(tmp_path).array(1000, 64, torch.float32, "states")
    assert (tmp_path / "states").stat().st_blocks * 512 >= 1000 * 64 * 4


def test_what_an_array_held_is_there_again(tmp_path: Path) -> None:
    Scratch(tmp_path).array(10, 4, torch.float32, "states")[:] = 3.0
    assert torch.equal(Scratch(tmp_path).array(10, 4, torch.float32, "states"), torch.full((10, 4), 3.0))


def test_an_array_of_no_tokens(tmp_path: Path) -> None:
    assert Scratch(tmp_path).array(0, 4, torch.float32).shape == (0, 4)


@needs_reservation
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refused(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refused)
    says = rf"{re.escape(str(tmp_path))} has no room for 160 bytes .*; [\d,]+ bytes are free\); set TMPDIR .*--work"
    with pytest.raises(CalibrationError, match=says):
        Scratch(tmp_path).array(10, 4, torch.float32)


@needs_reservation
def test_a_file_system_that_reserves_nothing_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unknown)
    assert Scratch(tmp_path).array(10, 4, torch.float32).shape == (10, 4)
