"""Times that were measured once on this machine, so that two calibrations of one model decide alike.

Which exits pay is decided by measured times, and times are never the same twice. So what was measured for a shape of
model on a machine is kept in the user's cache folder and taken from there, until it is asked to be measured anew: the
second bundle is then the first's to the byte. What tells shapes and machines apart is the caller's, in `about`; the
processor, the number of threads and the versions are added here.
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final, Protocol, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from exeunt.calibration.journal import fingerprint_of
from exeunt.kernels.native.build import cache_folder, processor

logger = logging.getLogger("exeunt.costs")

T = TypeVar("T")
_PACKAGES: Final = ("exeunt", "torch")


class Measurements(Protocol):
    """Where measured times come from."""

    def of(self, name: str, about: Sequence[str], kind: type[T], measure: Callable[[], T]) -> T:
        """What `measure` returns (a dataclass `kind`), or returned before for the same `name` and `about`."""
        ...


class MeasuredNow:
    """Measures whenever it is asked."""

    def of(self, name: str, about: Sequence[str], kind: type[T], measure: Callable[[], T]) -> T:
        """What `measure` returns."""
        return measure()


@dataclass(frozen=True, slots=True)
class RememberedCosts:
    """Keeps what was measured in the files of `folder`; with `anew` it measures, and keeps that instead.

    A folder that cannot be written costs the memory, not the calibration.
    """

    folder: Path
    anew: bool = False

    def of(self, name: str, about: Sequence[str], kind: type[T], measure: Callable[[], T]) -> T:
        """What `measure` returns (a dataclass `kind`), or returned before on this machine for `name` and `about`."""
        path = self.folder / f"{name}-{_machine(about)[:24]}.json"
        adapter = TypeAdapter(kind)
        if not self.anew:
            try:
                return adapter.validate_json(path.read_text())
            except (OSError, ValidationError):
                pass  # not measured yet, or the file is spoilt
        found = adapter.validate_json(
            adapter.dump_json(measure())
        )  # the very numbers that will be read again
        self._keep(path, adapter.dump_python(found, mode="json"))
        return found

    def _keep(self, path: Path, record: object) -> None:
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(record, indent=1) + "\n")
            partial.replace(path)
        except OSError as error:
            logger.warning(
                "Measured costs cannot be kept in %s (%s): the next calibration measures anew and may choose "
                "other exits.",
                self.folder,
                (error.strerror or str(error)).lower(),
            )


def costs_folder() -> Path:
    """Where this user's measured costs are kept; it need not exist."""
    return cache_folder().with_name("costs")


def _machine(about: Sequence[str]) -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = [f"{package} {version(package)}" for package in _PACKAGES]
    return fingerprint_of([*about, processor(), gpu, f"{torch.get_num_threads()} threads", *versions])
