"""A case: one call of a kernel's wrapper, and for which GPUs it is compiled."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from exeunt.kernels.tuned.launches import TunedLaunch
from scripts.compile_kernels.in_processes import CAPABILITIES

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT: Final = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
HIDDEN: Final = 4096
"""The width of a 7B model's states."""


@dataclass(frozen=True, slots=True)
class Case:
    """One call; the kernels that it launches are compiled."""

    name: str
    call: Callable[[], object]
    tested: bool = False
    """Whether the normal test suite compiles it: one case of each kernel, or of each kind of its ways."""
    launch: TunedLaunch | None = None
    """What a linear layer's call is told to run with; None: the rule's."""
    capabilities: tuple[int, ...] = CAPABILITIES
    """Compute capabilities that it is compiled for: 90 is 9.0."""


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype)
