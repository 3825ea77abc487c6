"""The CPU's kernels, compiled on a machine's first use: a phase of its own, not a silence inside another."""

import torch

from exeunt.calibration.progress import ProgressReport
from exeunt.kernels.native.library import is_compiled, native_library


def compile_kernels(device: torch.device, progress: ProgressReport) -> None:
    """Compile the native kernels where `device` is a CPU and this machine has not done so before."""
    if not must_compile(device):
        return
    with progress.phase("Compiling the CPU kernels, once", 1) as advance:
        native_library()
        advance(1)


def must_compile(device: torch.device) -> bool:
    """Whether `device` is a CPU and this machine has not compiled its kernels yet."""
    return device.type == "cpu" and not is_compiled()
