"""Whether the Triton kernels run for a device, and why not where they do not.

This module imports no Triton: a machine without it, or a process that only ever computes on a CPU, pays nothing.
"""

import importlib.util
import logging
import os
import re
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

OLDEST_CAPABILITY: Final = (8, 0)
"""Compute capability below which tensor cores know no bfloat16, which the kernels are written for."""
OLDEST_TRITON: Final = (3, 6)
"""The Triton that the kernels are written for, pyproject.toml's lower bound; an older one compiles other code."""

interpreted = False
"""Whether CPU tensors go to the Triton kernels too, under Triton's interpreter: very slow, for tests."""

_MOST_WORDS: Final = 300  # characters of another program's message that a line of the log repeats
_log = logging.getLogger(__name__)


def triton_runs(device: torch.device) -> bool:
    """Whether tensors on `device` go to the Triton kernels; one warning says why they do not on a GPU.

    `EXEUNT_TRITON=0` turns them off. Plain PyTorch runs instead, which is slower and not row-invariant. A GPU that is
    first asked about runs one small kernel; raises RuntimeError where that leaves it without an answer to PyTorch.
    """
    if device.type == "cpu":
        return interpreted
    return device.type == "cuda" and _runs_on(device.index if device.index is not None else 0)


def check_one_device(names: str, *tensors: Tensor) -> None:
    """Raise ValueError where `tensors`, called `names` in a sentence, are not all on one device.

    A kernel would take another memory's address for one of its own.
    """
    place = tensors[0].device
    for tensor in tensors:
        if tensor.device != place:
            raise ValueError(
                f"{names} are on {', '.join(str(each.device) for each in tensors)}, expected one device"
            )


def check_answers(device: torch.device) -> None:
    """Wait for `device` and have PyTorch compute on it; raises RuntimeError where it no longer does.

    After an illegal access, say, every call of this process fails: nothing is left to fall back to.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    found = float(torch.ones(8, device=device).sum())
    if found != 8.0:
        raise RuntimeError(f"{device} adds eight ones up to {found}: the device or its driver is faulty.")


@lru_cache(maxsize=16)
def _runs_on(index: int) -> bool:
    if os.environ.get("EXEUNT_TRITON", "1") == "0":
        return False
    reason = _missing(index)
    if reason is not None:
        _log.warning("The Triton kernels are not used on cuda:%d, PyTorch runs instead: %s", index, reason)
    return reason is None


def _missing(index: int) -> str | None:
    """Why the kernels cannot run on a GPU, None where they can."""
    if torch.version.hip is not None:
        return "they are written for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name(index)
        return (
            f"{name} has compute capability {capability[0]}.{capability[1]}, they need "
            f"{OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}"
        )
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    with torch.cuda.device(index):  # Triton launches kernels on the current one, whatever their tensors say
        return _launch_failure(torch.device("cuda", index))


def _launch_failure(device: torch.device) -> str | None:
    """What keeps Triton from launching kernels on `device`, found by launching one; None where nothing does.

    Triton compiles a piece of its own at run time, which takes a C compiler, and the driver must know the code that it
    makes: neither shows before. Raises RuntimeError where `device` does not answer PyTorch any more either.
    """
    try:
        version = _triton_version()
        if version is None or version[0] < OLDEST_TRITON:
            found = "of no version that is known" if version is None else version[1]
            return f"the package triton is {found}, they need {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]} or newer"
        found_right = _trial_is_right(device)
    except Exception as error:  # noqa: BLE001 - a compiler, a cache, a driver: PyTorch does without
        _log.debug("A first launch on %s failed.", device, exc_info=error)
        check_answers(device)
        return f"a first launch failed ({_first_line(error)})"
    return None if found_right else "a first launch computed something else than PyTorch does"


def _triton_version() -> tuple[tuple[int, int], str] | None:
    """The version of the Triton that is installed, as numbers and in its own words; None where it has none."""
    import triton

    words = str(getattr(triton, "__version__", ""))
    match = re.match(r"(\d+)\.(\d+)", words)
    return None if match is None else ((int(match[1]), int(match[2])), words)


def _trial_is_right(device: torch.device) -> bool:
    """Whether a small kernel on `device` comes to what PyTorch comes to on the CPU."""
    from exeunt.kernels.rows.reference import rms_norm_reference
    from exeunt.kernels.rows.triton import rms_norm_triton

    rows, weight = torch.arange(1.0, 65.0).view(4, 16), torch.arange(-8.0, 8.0)
    found = rms_norm_triton(rows.to(device), weight.to(device), 1e-5).cpu()
    return torch.allclose(found, rms_norm_reference(rows, weight, 1e-5), rtol=1e-5, atol=1e-6)


def _first_line(error: Exception) -> str:
    """An exception's kind and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:_MOST_WORDS]}".rstrip(" :")
