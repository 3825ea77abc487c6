"""The bundles of the packaged model in the user's cache: who may make one, and which ones nobody needs any more."""

import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from exeunt.calibration.progress import ProgressReport

logger = logging.getLogger("exeunt.packaged")

_OURS: Final = re.compile(r"packaged-[0-9a-f]{16}")
KEPT_DAYS: Final = 14  # since it was opened last
_ASK_AGAIN_S: Final = 0.25  # how soon a lock that another process holds is asked for again


def lock_of(bundle: Path) -> Path:
    """The file that is locked by the process that makes or removes `bundle`."""
    return bundle.with_name(f"{bundle.name}.lock")


@contextmanager
def alone(bundle: Path, progress: ProgressReport, while_waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of `bundle`, which the system gives back when this process ends, however it ends.

    Asked for again and again, not waited for in one call: a signal whose exception is lost then takes effect.
    """
    lock, waited = lock_of(bundle), False
    while True:
        with lock.open("a") as file:
            if _locked(file):
                if not _is_at(file, lock):
                    continue  # it was removed between the opening and the locking
                yield
                return
        if not waited:
            progress.note(
                f"Another process is calibrating the packaged model; waiting for its bundle ({lock} is locked)."
            )
        waited = True
        while_waiting()
        time.sleep(_ASK_AGAIN_S)


def remove_superseded(bundle: Path) -> None:
    """Remove the packaged model's bundles beside `bundle` that nobody has opened for `KEPT_DAYS` days.

    Another version of the model or the code made them, and it may still be in use: beside this one, or before an
    upgrade is taken back. One that another process is making or removing at the moment is left alone. A server that
    runs on one goes on: it has read it, and what it has mapped stays as long as it does.
    """
    oldest = time.time() - KEPT_DAYS * 86400
    try:
        names = sorted(_ours(bundle.parent) - {bundle.name})
    except OSError as error:
        logger.warning("Superseded bundles in %s could not be looked for: %s.", bundle.parent, error)
        return
    for name in names:
        old = bundle.with_name(name)
        try:
            if _last_opened(old) < oldest:
                _remove(old)
        except OSError as error:
            logger.warning("The superseded bundle %s could not be removed: %s.", old, error)


def note_opening(bundle: Path) -> None:
    """Remember that `bundle` was opened now. Where that cannot be kept, its making counts."""
    with suppress(OSError):
        lock_of(bundle).touch()


def _last_opened(bundle: Path) -> float:
    """When the bundle was opened last, or made, in seconds since 1970."""
    times = [path.stat().st_mtime for path in (bundle, lock_of(bundle)) if path.exists()]
    return max(times, default=0.0)


def _ours(folder: Path) -> set[str]:
    """The names of the packaged model's bundles in `folder`, also of those of which only the lock is there."""
    names = {path.name.removesuffix(".lock") for path in folder.iterdir()}
    return {name for name in names if _OURS.fullmatch(name)}


def _remove(bundle: Path) -> None:
    lock = lock_of(bundle)
    with lock.open("a") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process has it, or nobody can be asked for it here
            return
        if not _is_at(file, lock):
            return
        if bundle.is_dir() and not bundle.is_symlink():
            shutil.rmtree(bundle)
            logger.info("Removed %s, which the new bundle supersedes.", bundle)
        lock.unlink()


def _locked(file: IO[str]) -> bool:
    """Whether this process has the lock on `file` now. Where the file system has no locks, nobody waits."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning(
            "Files cannot be locked here (%s): others may calibrate the same at once.", error.strerror
        )
    return True


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether the open `file` is the one that `path` names, and not one removed since."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False
