"""The file of `--json`: looked at before the work whose result it is to hold; a new one appears in one step."""

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exeunt.deploy.arguments import UsageError

_DESCRIPTOR: Final = re.compile(r"(?:/dev/fd/|/proc/self/fd/)(\d+)|/dev/(stdout|stderr)")
_TEXT_ENDING: Final = ".txt"  # of what is read where --data is a folder
_STANDARD: Final = {"stdout": 1, "stderr": 2}


class JSONFileError(OSError):
    """The result could not be written after all; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class JSONFile:
    """A file that can be written as far as one can tell beforehand; `path` is what was asked for."""

    path: Path

    @classmethod
    def checked(cls, path: Path, *, model: Path | str | None = None, data: str | None = None) -> "JSONFile":
        """The file at `path`.

        Args:
            path: what was asked for.
            model: the bundle or checkpoint that is read; what is no folder on this machine is passed over.
            data: the text that is read, a file or a folder; what is neither is passed over.

        Raises UsageError where it cannot be written, or where writing it would change what is read.
        """
        file = cls(path)
        if model is not None:
            file._refuse_in_model(model)
        if data is not None:
            file._refuse_in_data(data)
        try:
            if path.is_dir():
                raise IsADirectoryError("it is a folder")
            if not file._is_there:
                with file._beside():
                    pass
            elif not os.access(path, os.W_OK):
                raise PermissionError("it may not be written")
        except OSError as error:
            raise UsageError(
                f"--json is {path}, which cannot be written: {_reason(error)}; give a file in a folder that can be."
            ) from error
        return file

    def _refuse_in_model(self, model: Path | str) -> None:
        """Raise UsageError where this is, or would be, one of the files in the folder `model`."""
        folder = os.path.realpath(model)
        if not os.path.isdir(folder):
            return
        held = os.listdir(folder) if os.access(folder, os.R_OK) else []
        if self._target.is_relative_to(folder) or any(self._is(os.path.join(folder, each)) for each in held):
            raise UsageError(
                f"--json is {self.path}, which is in the model's folder {model}; give a file outside it."
            )

    def _refuse_in_data(self, data: str) -> None:
        """Raise UsageError where this is the file `data`, or would be a text in the folder `data`."""
        place = os.path.realpath(data)
        text = self._target.suffix.lower() == _TEXT_ENDING and self._target.is_relative_to(place)
        if self._is(place) or (text and os.path.isdir(place)):
            raise UsageError(
                f"--json is {self.path}, which is one of the texts of --data {data}; give another file."
            )

    def _is(self, other: str) -> bool:
        """Whether this is the regular file `other`, under whichever name."""
        try:
            return self.path.is_file() and os.path.samefile(self.path, other)
        except OSError:
            return False

    def write(self, content: object) -> None:
        """Write `content` as JSON. Raises JSONFileError."""
        text = json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"
        data = text.encode(errors="backslashreplace")  # a path need not be Unicode
        try:
            if (descriptor := self._descriptor) is not None:
                with os.fdopen(os.dup(descriptor), "wb") as stream:
                    stream.write(data)
            elif self._is_there:  # with its mode, its links and its mounts
                self.path.write_bytes(data)
            else:
                with self._beside() as partial:
                    partial.write_bytes(data)
                    partial.replace(self._target)
        except OSError as error:
            raise JSONFileError(
                f"--json is {self.path}, and the result could not be written: {_reason(error)}; give another file "
                "and run again."
            ) from error

    @property
    def _descriptor(self) -> int | None:
        """The open file that a name such as /dev/stdout stands for: what is in it already stays."""
        found = _DESCRIPTOR.fullmatch(str(self.path))
        return None if found is None else int(found[1] or _STANDARD[found[2]])

    @property
    def _is_there(self) -> bool:
        return self.path.exists()

    @property
    def _target(self) -> Path:
        """Where the file will lie, links followed."""
        return Path(os.path.realpath(self.path))

    @contextmanager
    def _beside(self) -> Iterator[Path]:
        """An empty file in the same folder, gone at the end if it is still there."""
        partial = self._target.with_name(f".{self._target.name}.{secrets.token_hex(4)}.partial")
        try:
            partial.touch(exist_ok=False)
            yield partial
        finally:
            partial.unlink(missing_ok=True)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
