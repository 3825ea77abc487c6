"""`exeunt calibrate`: what is asked for, looked at as far as it can be before the long work; then the work."""

import os
from pathlib import Path

from exeunt.calibration.journal import FINGERPRINT
from exeunt.calibration.options import CalibrationOptions, work_place
from exeunt.calibration.pipeline import calibrate
from exeunt.calibration.progress import watched_progress
from exeunt.compression.bundle import BundleError
from exeunt.compression.bundle_writer import check_target
from exeunt.deploy import packaged_model
from exeunt.deploy.advice import advice_line
from exeunt.deploy.arguments import UsageError
from exeunt.deploy.loading import find_source
from exeunt.deploy.signals import Interrupted, InterruptibleProgress, interruptible


def make_bundle(options: CalibrationOptions) -> None:
    """Calibrate, telling how far it is, and say what can be done with the bundle. Raises what `calibrate` raises."""
    try:
        with interruptible() as interruption:
            path = calibrate(options, InterruptibleProgress(watched_progress(), interruption))
            print(f"{path} is ready: exeunt inspect {path}; exeunt serve {path}")
            if advice := advice_line(path):
                print(advice)
    except Interrupted as ended:
        ended.kept = _kept(options)
        raise


def _kept(options: CalibrationOptions) -> Path | None:
    """The folder in which what was finished is kept, if anything is."""
    folder = work_place(options)
    return folder if options.work is not None and (folder / FINGERPRINT).is_file() else None


def check_checkpoint(model: str) -> None:
    """Raise UsageError or SettingsError for what is no checkpoint that a bundle could be made of."""
    if find_source(model).is_bundle:
        raise UsageError(f"{model} is a bundle already; give the checkpoint that it was made from.")


def check_out(out: Path) -> None:
    """Raise UsageError where no bundle may, or can, be written at `out`."""
    try:
        target = check_target(out)
    except BundleError as error:
        raise UsageError(f"{error}.") from error
    there = next(folder for folder in target.parents if os.path.lexists(folder))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise UsageError(f"--out is {out}, and nothing can be written in {there}; give another folder.")


def calibration_data(model: str, data: str | None) -> str:
    """The text to calibrate on; the packaged one is the packaged model's own and certifies nothing about another.

    Raises UsageError where `data` is None and `model` another.
    """
    if data is not None:
        return data
    folder = packaged_model.path()
    if Path(model).resolve() != folder.resolve():
        raise UsageError(
            f"Give --data: a text of the kind that {model} will serve (a file, a folder, hf:NAME)."
        )
    return str(folder / packaged_model.CALIBRATION_TEXT)
