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
_STANDARD: Final = {"stdout": 1, "stderr": 2}


class JSONFileError(OSError):
    """The result could not be written after all; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class JSONFile:
    """A file that can be written as far as one can tell beforehand; `path` is what was asked for."""

    path: Path

    @classmethod
    def checked(cls, path: Path) -> "JSONFile":
        """The file at `path`. Raises UsageError where it cannot be written."""
        file = cls(path)
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
