"""The devices that models run on, by the names that people give."""

import logging
import os
import re
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Final

import torch

NAMES: Final = "auto, cpu, cuda or cuda:N"
_NAME: Final = re.compile(r"auto|cpu|cuda(:(?P<index>\d{1,4}))?")
_NVIDIA_SIGNS: Final = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia"))
"""What an NVIDIA driver puts into the file system: there seems to be a GPU, whether PyTorch can use it or not."""
_ADVICE: Final = re.compile(r"[.] (?:Please|Setting) ")
_log = logging.getLogger(__name__)


class DeviceError(ValueError):
    """A device that is not there; the message is the second half of a sentence that begins with its name."""


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a CUDA device where there is one. Raises DeviceError.

    A CUDA device becomes this thread's current one: Triton launches kernels there, whatever their tensors say. One
    warning says why "auto" is the CPU where there seems to be an NVIDIA GPU that PyTorch cannot use.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise DeviceError(f"it must be {NAMES}")
    if name == "cpu":
        return torch.device("cpu")
    found = _cuda_devices()
    if name == "auto":
        if not found:
            _tell_unused()
        return torch.device("cuda" if found else "cpu")
    if not found:
        reason = _no_cuda()
        why = "" if reason is None else f" ({reason})"
        raise DeviceError(f"PyTorch finds no CUDA device on this machine{why}, use cpu or auto")
    if int(match["index"] or 0) >= found:
        raise DeviceError(
            f"PyTorch finds {found} CUDA device{'' if found == 1 else 's'}, counted from 0 on this machine, use one of "
            "those"
        )
    if match["index"] is not None:
        torch.cuda.set_device(int(match["index"]))
    return torch.device(name)


def _cuda_devices() -> int:
    """How many CUDA devices PyTorch can use."""
    with warnings.catch_warnings():
        # PyTorch's own, of a driver that is too old: `_no_cuda` says it in place
        warnings.simplefilter("ignore")
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _no_cuda() -> str | None:
    """Why PyTorch finds no CUDA device, in its own words; None where it has none."""
    if torch.version.cuda is None:
        return "it is built without CUDA" if torch.version.hip is None else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()  # type: ignore[no-untyped-call] # torch does not annotate it
    except (RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        fact = _ADVICE.split(said)[0].rstrip(".")  # advice about drivers in general stands behind it
        return f"it is built for CUDA {torch.version.cuda}: {fact}"
    return None


@lru_cache(maxsize=1)
def _tell_unused() -> None:
    """Say once that there seems to be a GPU, and that PyTorch, though built for such, cannot use it.

    Whoever hides GPUs from CUDA, or has a PyTorch without it, has chosen the CPU.
    """
    # CUDA sees the devices in front of the first name that is none: "-1" and "none" hide all of them
    hidden = re.match(r"\s*(\d|GPU-|MIG-)", os.environ.get("CUDA_VISIBLE_DEVICES", "0")) is None
    if torch.version.cuda is None or hidden or not any(sign.exists() for sign in _NVIDIA_SIGNS):
        return
    _log.warning(
        "The CPU is used though there seems to be an NVIDIA GPU: PyTorch finds no CUDA device%s; give --device cpu "
        "where that is meant.",
        "" if (reason := _no_cuda()) is None else f" ({reason})",
    )
