"""What is said of whatever went wrong in a command, in one line, and the exit status that goes with it.

Status 2 is wrong usage: an option, a path or a text that was given cannot be what is meant, and the same words will
fail again. Status 1 is everything else: damaged files, a network, a port or memory that others have, a bug.
"""

import re
import sys
from collections.abc import Sequence
from typing import Any, Final

import typer

from exeunt.deploy.arguments import UsageError, misused

USAGE_ERROR: Final = 2
_INTERRUPTED: Final = 130
_WRONG_USAGE: Final = (
    ("exeunt.deploy.loading", "SettingsError"),
    ("exeunt.deploy.load_driver", "LoadError"),
    ("exeunt.compression.checkpoint", "NoCheckpointError"),
    ("exeunt.calibration.errors", "OptionError"),
    ("exeunt.calibration.errors", "CorpusError"),
)
"""By name: a command that needs none of these modules does not import them to fail."""


def told(error: Exception, arguments: Sequence[str]) -> tuple[str, int]:
    """What to say of `error`, which the command line `arguments` ended with, and the exit status."""
    parser_error: Any = typer.BadParameter.__mro__[1]  # the usage error of whichever click typer builds on
    if isinstance(error, parser_error):
        return misused(error, arguments), USAGE_ERROR
    if type(error).__name__ == "Abort":
        return "interrupted", _INTERRUPTED
    if isinstance(error, _usage_errors()):
        return str(error), USAGE_ERROR
    if (failure := _device_failure(error)) is not None:
        return failure, 1
    if isinstance(error, OSError | ValueError | RuntimeError) or type(error).__module__.startswith("exeunt."):
        return str(error) or type(error).__name__, 1
    return (
        f"{type(error).__name__}: {error} (a bug: run again with --log-level debug for the traceback)",
        1,
    )


def _device_failure(error: Exception) -> str | None:
    """One line for what PyTorch says of a GPU in many, its advice to programmers left out; None for all else.

    By name and words, too: PyTorch is not imported for a command that fails without it.
    """
    if not isinstance(error, RuntimeError):
        return None
    said = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError":
        fact = re.split(r"[.] (?:Including|Of the allocated|Process \d|If reserved|See )", said)[0].rstrip(
            "."
        )
        fact = re.sub(r"[.] (?=[A-Z])", "; ", fact)
        return f"{fact or 'A device is out of memory'}: free some there, ask for less, or choose another --device."
    first = str(error).strip().split("\n", 1)[0].rstrip(".")
    if not first.startswith(("CUDA error: ", "Triton Error [CUDA]: ")):
        return None
    if "out of memory" in first or "ALLOC_FAILED" in first:
        return (
            f"{first}: another process may hold the GPU's memory, free some there or choose another --device."
        )
    if "busy or unavailable" in first:
        return f"{first}: another process has the GPU to itself, end that or choose another --device."
    return (
        f"{first}: the GPU or its driver failed, or this PyTorch has no code for it; `nvidia-smi` and the system's log "
        "may say more, --device cpu does without."
    )


def _usage_errors() -> tuple[type[Exception], ...]:
    loaded = ((sys.modules.get(module), name) for module, name in _WRONG_USAGE)
    return (UsageError, *(getattr(module, name) for module, name in loaded if module is not None))
