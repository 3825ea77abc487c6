"""The packaged model, calibrated on first use: the bundle is kept in the user's cache under what it was made from."""

import hashlib
import logging
import os
import shutil
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Final

from exeunt.compression.bundle import BundleError, open_bundle
from exeunt.compression.manifest import FORMAT_VERSION
from exeunt.deploy import packaged_model
from exeunt.deploy.loading import Source, find_source

logger = logging.getLogger("exeunt.packaged")

CHECKPOINT_FILES: Final = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
CODE: Final = ("exeunt.kernels", "exeunt.compression", "exeunt.calibration")
CALIBRATION_TEXT: Final = "calibration.txt"
_ORIGIN: Final = "written by the packaged model itself, see its MODEL_CARD.md"


def find_or_calibrate(model: str | None) -> Source:
    """Where the model to serve lies; without a name that is the packaged one, calibrated now if it never was.

    Raises SettingsError for a path that is not there, and what `calibrate` raises.
    """
    return find_source(model) if model is not None else Source(str(packaged_bundle()), is_bundle=True)


def packaged_bundle() -> Path:
    """The bundle of the packaged model, made on first use with progress on standard error.

    Raises FileNotFoundError where the package does not lie on disk, and what `calibrate` raises.
    """
    folder = packaged_model.path()
    target = cache_folder() / "bundles" / f"packaged-{content_key(folder)}"
    if target.exists():
        try:
            return open_bundle(target).path
        except BundleError as error:
            logger.warning("The cached bundle is unusable and is made anew: %s.", error)
            shutil.rmtree(target)
    _calibrate(folder, target)
    return target


def content_key(folder: Path) -> str:
    """A short hash of what a bundle is made from: either changed, the bundle is another.

    That is the model with its tokenizer and text (not the card beside them), and the code that calibrates.
    """
    wanted = (folder / name for name in (*CHECKPOINT_FILES, CALIBRATION_TEXT))
    made_from = [path for path in wanted if path.exists()]
    for layer in CODE:
        for place in import_module(layer).__path__:
            made_from += sorted(
                path for path in Path(place).rglob("*") if path.suffix in (".py", ".cpp", ".h")
            )
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


def _calibrate(folder: Path, target: Path) -> None:
    from exeunt.calibration.options import CalibrationOptions
    from exeunt.calibration.pipeline import calibrate
    from exeunt.calibration.progress import TerminalProgress

    progress = TerminalProgress()
    progress.note(f"Calibrating the packaged model, once; the bundle is kept in {target}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    data = str(folder / CALIBRATION_TEXT)
    calibrate(CalibrationOptions(model=str(folder), out=target, data=data, origin=_ORIGIN), progress)
