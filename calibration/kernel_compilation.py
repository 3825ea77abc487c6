"""The CPU's kernels, compiled on a machine's first use: a phase of its own, not a silence inside another."""

import torch

from exeunt.calibration.progress import ProgressReport
from exeunt.kernels.native.library import is_compiled, native_library


def compile_kernels(device: torch.device, progress: ProgressReport) -> None:
    """Compile the native kernels where `device` is a CPU and this machine has not done so before."""
    if device.type != "cpu" or is_compiled():
        return
    with progress.phase("Compiling the CPU kernels, once", 1) as advance:
        native_library()
        advance(1)
