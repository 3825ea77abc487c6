"""The packaged model, calibrated on first use: the bundle is kept in the user's cache under what it was made from."""

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from exeunt.calibration.errors import CalibrationError
from exeunt.calibration.progress import ProgressReport, watched_progress
from exeunt.calibration.sources import source_files
from exeunt.compression.bundle import BundleError, open_bundle
from exeunt.compression.bundle_format import FORMAT_VERSION
from exeunt.deploy import packaged_model
from exeunt.deploy.bundle_cache import alone, note_opening, remove_superseded
from exeunt.deploy.loading import SettingsError

if TYPE_CHECKING:
    from exeunt.calibration.options import CalibrationOptions

logger = logging.getLogger("exeunt.packaged")

CHECKPOINT_FILES: Final = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
_ORIGIN: Final = "written by the packaged model itself, see its MODEL_CARD.md"
EVALUATION_TOKENS: Final = 2_000
"""Every mode is evaluated on so many tokens before the first start can serve; `exeunt calibrate` takes 5,000."""


class PackagedModelError(RuntimeError):
    """The packaged model, or its text, is not what it should be: no fault of whoever started the server."""


def packaged_bundle(
    *,
    device: str = "auto",
    progress: ProgressReport | None = None,
    on_calibration: Callable[[], None] = lambda: None,
    while_waiting: Callable[[], None] = lambda: None,
) -> Path:
    """The bundle of the packaged model, calibrated now, on `device`, if it never was; `on_calibration` is told before.

    One process at a time calibrates; others wait for its bundle, and call `while_waiting` again and again meanwhile.
    Once the new bundle stands, those of other versions that nobody has opened for a while are removed.

    Raises FileNotFoundError where the package does not lie on disk, SettingsError where nothing can be kept in the
    cache folder, PackagedModelError where it cannot be calibrated, and what else `calibrate` raises.
    """
    folder, target = packaged_model.path(), bundle_folder()
    with suppress(BundleError):
        found = open_bundle(target).path
        note_opening(target)
        return found
    progress = progress or watched_progress()
    _make_room(target.parent)
    with alone(target, progress, while_waiting):
        if target.exists():  # spoilt, or made by another process meanwhile
            try:
                return open_bundle(target).path
            except BundleError as error:
                logger.warning("The cached bundle is unusable and is made anew: %s.", error)
                shutil.rmtree(target)
        on_calibration()
        progress.note(f"Calibrating the packaged model, once; the bundle is kept in {target}.")
        _calibrate(folder, target, device, progress)
    remove_superseded(target)
    return target


def calibration_options(folder: Path, target: Path, device: str = "auto") -> "CalibrationOptions":
    """How the packaged model in `folder` is calibrated into `target`."""
    from exeunt.calibration.options import CalibrationOptions

    data = str(folder / packaged_model.CALIBRATION_TEXT)
    return CalibrationOptions(
        model=str(folder),
        out=target,
        data=data,
        origin=_ORIGIN,
        device=device,
        evaluation_tokens=EVALUATION_TOKENS,
    )


def bundle_folder() -> Path:
    """Where the packaged model's bundle is kept once it is made. Raises FileNotFoundError as `packaged_bundle`."""
    return cache_folder() / "bundles" / f"packaged-{content_key(packaged_model.path())}"


def content_key(folder: Path) -> str:
    """A short hash of what a bundle is made from: either changed, the bundle is another.

    That is the model with its tokenizer and text (not the card beside them), and the code that calibrates.
    """
    wanted = (folder / name for name in (*CHECKPOINT_FILES, packaged_model.CALIBRATION_TEXT))
    made_from = [path for path in wanted if path.exists()]
    made_from += source_files()
    digest = hashlib.sha256(f"{version('exeunt')} {FORMAT_VERSION}".encode())
    for file in made_from:
        digest.update(f"\0{file.name}\0".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """The user's cache folder for Exeunt (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "exeunt"


def _calibrate(folder: Path, target: Path, device: str, progress: ProgressReport) -> None:
    from exeunt.calibration.pipeline import calibrate

    try:
        calibrate(calibration_options(folder, target, device), progress)
    except CalibrationError as error:
        raise PackagedModelError(f"The packaged model cannot be calibrated: {error}") from error


def _make_room(folder: Path) -> None:
    """Make the cache's folder before the long work whose result it is to hold. Raises SettingsError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SettingsError(
            f"The bundle of the packaged model cannot be kept in {folder}: {reason}; set XDG_CACHE_HOME to a folder "
            "that can be written."
        ) from error
