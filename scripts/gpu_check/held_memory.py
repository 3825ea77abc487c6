"""What a call takes of a device's memory, by PyTorch's own count."""

from collections.abc import Callable
from typing import TypeVar

import torch

from scripts.gpu_check.report import Context, Found

T = TypeVar("T")


def watched_memory(context: Context, run: Callable[[], T]) -> tuple[T, Found]:
    """What a run gives, and the bytes that tensors took on the device before and at most meanwhile; none of a CPU."""
    if not context.cuda:
        return run(), {}
    before = torch.cuda.memory_allocated(context.device)
    torch.cuda.reset_peak_memory_stats(context.device)
    result = run()
    most = torch.cuda.max_memory_allocated(context.device)
    return result, {"device_bytes_before": before, "device_bytes_at_most": most}
