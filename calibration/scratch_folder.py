"""The temporary folder of a calibration that keeps no unfinished work, and what killed ones left of theirs.

A folder is named after the bundle that it is for, and locked for as long as its process lives: one that is not locked
belongs to nobody, and the next calibration for the same bundle removes it.
"""

import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from exeunt.calibration.errors import OptionError
from exeunt.calibration.journal import fingerprint_of

_PREFIX: Final = "exeunt-calibrate-"
_LOCK: Final = "lock"
_ABANDONED: Final = 600.0  # seconds in which nothing was written to a bundle that was being written


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A temporary folder for the calibration that makes the bundle `target`; gone at the end, however it ends.

    Folders that killed calibrations of the same bundle have left are removed first.
    """
    prefix = f"{_PREFIX}{fingerprint_of([str(target.resolve())])[:12]}-"
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with _locked(folder / _LOCK) as ours:
            if ours:
                shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix) as made:
        own = Path(made) / _LOCK
        own.with_suffix(".new").touch()
        with _locked(own.with_suffix(".new")):
            own.with_suffix(".new").rename(own)  # under this name it was never free to take
            yield Path(made)


def remove_partial_bundles(target: Path) -> None:
    """Remove what killed calibrations had written of the bundle `target`, where nobody has gone on for ten minutes."""
    target = target.resolve()
    ours = re.compile(rf"\.{re.escape(target.name)}\.partial-[0-9a-f]{{8}}")
    try:
        beside = [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]
    except OSError:  # no such folder yet, or none that can be listed
        return
    for partial in beside:
        with suppress(OSError):
            newest = max(path.stat().st_mtime for path in (partial, *partial.rglob("*")))
            if time.time() - newest > _ABANDONED:
                shutil.rmtree(partial, ignore_errors=True)


def check_bundle_can_stand(target: Path) -> None:
    """Make the folder that the bundle `target` is written to and remove it again. Raises OptionError where it cannot
    be made: a name that is too long, or a place that takes no folder, is to be told before the work.
    """
    target = target.resolve()
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    _check_can_be_made(partial, "--out", f"--out is {target}")


def check_work_can_stand(folder: Path) -> None:
    """The same for the folder of unfinished work, where it is not there already."""
    if not folder.exists():
        _check_can_be_made(folder.resolve(), "--work", f"Unfinished work is to be kept in {folder}")


def _check_can_be_made(folder: Path, option: str, asked: str) -> None:
    """Make `folder` and its missing parents and remove them again. Raises OptionError: `asked`, why not, `option`."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OptionError(
            f"{asked}, and no folder can be made there ({reason}); give another {option}."
        ) from error
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """The lock of an existing file, as long as the context lasts; False where another has it or there is none."""
    try:
        import fcntl
    except ImportError:  # no locks on this system: nothing is known to be left over
        yield False
        return
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)
