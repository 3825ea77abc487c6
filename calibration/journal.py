"""What a calibration has finished, in the files of a folder, so that one that was interrupted goes on where it stopped.

A journal belongs to one calibration: it is opened with a fingerprint of everything that decides the result, and one
that was kept for another is cleared. An entry is one safetensors file, written beside its place and renamed, so that it
is there whole or not at all.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from exeunt.calibration.errors import CalibrationError, OptionError
from exeunt.compression.tensor_file import TensorFileError, read_tensors, write_tensors

FINGERPRINT: Final = "fingerprint"
_ENTRY: Final = ".safetensors"
_RECORD: Final = "record"
_SCRATCH: Final = "states"
_LOCK: Final = "lock"
_SEAL: Final = "seal"
_HELD: dict[Path, int] = {}  # this process's locks: a descriptor by folder

Entry = tuple[dict[str, Tensor], Any]
"""An entry's tensors by name, and its record: JSON values."""


class Journal(Protocol):
    """Remembers finished steps by name."""

    def read(self, name: str) -> Entry | None:
        """What was written under `name`; None where that step was never finished."""
        ...

    def write(self, name: str, tensors: Mapping[str, Tensor], record: Any) -> None:
        """Remember a finished step: `tensors` and a `record` of JSON values."""
        ...


class NoJournal:
    """Remembers nothing: for work that is begun anew when it is interrupted."""

    def read(self, name: str) -> Entry | None:
        """Nothing."""

    def write(self, name: str, tensors: Mapping[str, Tensor], record: Any) -> None:
        """Forget it."""


class FolderJournal:
    """The journal in a folder of its own; `scratch` is a folder inside it for arrays that outlive the process."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Open the journal of the calibration that `fingerprint` names; what another has left in `folder` is removed.

        Raises CalibrationError where `folder` cannot be written, OptionError where it is something else.
        """
        self.folder, self._fingerprint = folder, fingerprint
        self.resumed = False  # whether there was something to go on from
        try:
            folder.mkdir(parents=True, exist_ok=True)
            check_no_other(folder)
            _lock(folder)
            self.resumed = self._kept(fingerprint)
            self.scratch.mkdir(exist_ok=True)
            _write(folder / FINGERPRINT, fingerprint)
        except OSError as error:
            raise self._problem(error) from error

    @property
    def scratch(self) -> Path:
        """The folder for arrays."""
        return self.folder / _SCRATCH

    def read(self, name: str) -> Entry | None:
        """What was written under `name`; None where that step was never finished, or its file cannot be read."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            tensors, metadata = read_tensors(path)
            record = metadata[_RECORD]
            if metadata[_SEAL] != _seal(self._fingerprint, tensors, record):
                raise TensorFileError(f"{path} is not as it was written")
            return tensors, json.loads(record)
        except (TensorFileError, KeyError, json.JSONDecodeError):
            path.unlink(missing_ok=True)  # spoilt: the step is done again
            return None

    def write(self, name: str, tensors: Mapping[str, Tensor], record: Any) -> None:
        """Remember a finished step. Raises CalibrationError where the disk does not take it."""
        path = self._path(name)
        partial = path.with_suffix(".partial")
        try:
            partial.unlink(missing_ok=True)
            text = json.dumps(record)
            seal = _seal(self._fingerprint, tensors, text)
            write_tensors(partial, tensors, {_RECORD: text, _SEAL: seal})
            partial.replace(path)
        except OSError as error:
            raise self._problem(error) from error

    def remove(self) -> None:
        """Remove what is its own, and the folder if nothing else is in it: the calibration is done."""
        self._clear()
        for name in (FINGERPRINT, _LOCK):
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def close(self) -> None:
        """Let others have the folder."""
        _unlock(self.folder)

    def _clear(self) -> None:
        """Remove entries and arrays."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        for name in os.listdir(self.folder):
            if name.endswith((_ENTRY, ".partial")):
                (self.folder / name).unlink(missing_ok=True)

    def _problem(self, error: OSError) -> CalibrationError:
        reason = (error.strerror or str(error)).lower()
        return CalibrationError(
            f"Unfinished work cannot be kept in {self.folder} ({reason}); give another --work, or `--work none` to "
            "keep nothing."
        )

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_ENTRY}"

    def _kept(self, fingerprint: str) -> bool:
        """Whether the folder holds this calibration's work; another's is removed."""
        with suppress(OSError, UnicodeDecodeError):
            if (self.folder / FINGERPRINT).read_text() == fingerprint:
                return any(name.endswith(_ENTRY) for name in os.listdir(self.folder))
        self._clear()
        return False


def check_no_other(folder: Path) -> None:
    """Raise OptionError where `folder`, which is there, holds what no journal wrote."""
    held = set(os.listdir(folder))
    if held - {_LOCK} and (FINGERPRINT not in held or not all(_is_ours(name) for name in held)):
        raise OptionError(
            f"{folder} holds something else than unfinished work; give another --work or remove it."
        )


def fingerprint_of(parts: Iterable[str]) -> str:
    """One hexadecimal digest of all `parts`, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}\0{part}".encode())
    return digest.hexdigest()


def file_state(files: Iterable[Path]) -> list[str]:
    """What tells that `files` are as they were, without reading them: names, sizes and times of change."""
    return [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in sorted(files)]


def _lock(folder: Path) -> None:
    """Take the folder's lock for this process. Raises CalibrationError where another process has it."""
    place = folder.resolve()
    if place in _HELD:
        return
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # no locks on this system
        pass
    except OSError as error:
        os.close(descriptor)
        raise CalibrationError(
            f"Another calibration works in {folder}; wait for it, or give another --work."
        ) from error
    _HELD[place] = descriptor


def _unlock(folder: Path) -> None:
    """Let other processes have the folder."""
    descriptor = _HELD.pop(folder.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


def _seal(fingerprint: str, tensors: Mapping[str, Tensor], record: str) -> str:
    """What tells that an entry is whole, and of the calibration of that fingerprint."""
    digest = hashlib.blake2b(f"{fingerprint}\0{record}\0".encode(), digest_size=16)
    for name in sorted(tensors):
        held = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}\0".encode())
        digest.update(held.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_ours(name: str) -> bool:
    return name in (FINGERPRINT, _SCRATCH, _LOCK) or name.endswith((_ENTRY, ".partial"))


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
