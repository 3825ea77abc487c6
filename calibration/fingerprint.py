"""What a calibration's result hangs on: of two with one fingerprint, one may go on for the other."""

import hashlib
from dataclasses import fields
from importlib.metadata import version
from typing import Final

import torch

from exeunt.calibration.checkpoint_contents import checkpoint_contents
from exeunt.calibration.corpus import SHARES, Splits
from exeunt.calibration.journal import file_state, fingerprint_of
from exeunt.calibration.options import CalibrationOptions
from exeunt.calibration.sources import source_files
from exeunt.compression.bundle_format import FORMAT_VERSION
from exeunt.compression.checkpoint import Checkpoint
from exeunt.kernels.native.build import processor

_OF_NO_MOMENT: Final = frozenset({"out", "work", "model", "data", "costs", "stream_weights"})
"""Options that do not change the result, or that are looked at by their contents."""


def calibration_fingerprint(
    options: CalibrationOptions, checkpoint: Checkpoint, corpus_sha256: str, splits: Splits
) -> str:
    """One digest of options, model, text, its tokens, code, versions and threads.

    The checkpoint's weights are known by name, size, time of change and a sample (`checkpoint_contents`): reading all
    of them would take as long as a step that is to be saved. Times measured on the machine are no part of it: who goes
    on takes those that are remembered, and where none are measures anew and may keep other exits of those that were
    trained, as another calibration might.
    """
    asked = [
        f"{field.name}={getattr(options, field.name)!r}"
        for field in fields(options)
        if field.name not in _OF_NO_MOMENT
    ]
    machine = [processor(), f"{torch.get_num_threads()} threads", str(torch.cuda.is_available())]
    versions = [f"{package} {version(package)}" for package in ("exeunt", "torch", "numpy", "scipy")]
    code = [fingerprint_of(path.read_text() for path in source_files())]
    return fingerprint_of(
        [
            *asked,
            *file_state(checkpoint.files),
            *checkpoint_contents(checkpoint),
            corpus_sha256,
            _tokens_sha256(splits),
            *machine,
            *versions,
            *code,
            str(FORMAT_VERSION),
        ]
    )


def _tokens_sha256(splits: Splits) -> str:
    """A digest of the rows of all splits, in order."""
    digest = hashlib.sha256()
    for name in SHARES:
        for row in getattr(splits, name):
            digest.update(f"{name} {len(row)}\0".encode())
            digest.update(row.numpy().tobytes())
    return digest.hexdigest()
