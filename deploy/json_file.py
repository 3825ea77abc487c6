"""The file of `--json`: looked at before the work whose result it is to hold, and replaced in one step after it."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from exeunt.deploy.arguments import UsageError


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
            if file._target.is_dir():
                raise IsADirectoryError("it is a folder")
            if file._target.exists() and not os.access(file._target, os.W_OK):
                raise PermissionError("it may not be written")
            if not file._in_place:
                with file._beside():
                    pass
        except OSError as error:
            raise UsageError(
                f"--json is {path}, which cannot be written: {_reason(error)}; give a file in a folder that can be."
            ) from error
        return file

    def write(self, content: object) -> None:
        """Write `content` as JSON, whole or not at all. Raises JSONFileError."""
        text = json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"
        try:
            if self._in_place:
                self._target.write_text(text, encoding="utf-8")
                return
            with self._beside() as partial:
                partial.write_text(text, encoding="utf-8")
                partial.replace(self._target)
        except OSError as error:
            raise JSONFileError(
                f"--json is {self.path}, and the result could not be written: {_reason(error)}; give another file "
                "and run again."
            ) from error

    @property
    def _in_place(self) -> bool:
        """Whether it is a pipe or a device, such as /dev/stdout: nothing to put another file in place of."""
        return self.path.exists() and not self.path.is_file()

    @property
    def _target(self) -> Path:
        """Where the file lies, links followed; of a pipe or device the name given."""
        return self.path if self._in_place else Path(os.path.realpath(self.path))

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
