"""Whether the Triton kernels run for a device, and why not where they do not.

This module imports no Triton: a machine without it, or a process that only ever computes on a CPU, pays nothing.
"""

import importlib.util
import logging
import os
from functools import lru_cache
from typing import Final

import torch

OLDEST_CAPABILITY: Final = (8, 0)
"""Compute capability below which tensor cores know no bfloat16, which the kernels are written for."""

interpreted = False
"""Whether CPU tensors go to the Triton kernels too, under Triton's interpreter: very slow, for tests."""

_log = logging.getLogger(__name__)


def triton_runs(device: torch.device) -> bool:
    """Whether tensors on `device` go to the Triton kernels; one warning says why they do not on a GPU.

    `EXEUNT_TRITON=0` turns them off. Plain PyTorch runs instead, which is slower and not row-invariant.
    """
    if device.type == "cpu":
        return interpreted
    return device.type == "cuda" and _runs_on(device.index if device.index is not None else 0)


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
    return None
