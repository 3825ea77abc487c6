"""One thing to time: what every implementation of an operation is called with, and how many bytes it must move."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exeunt.kernels.timing import Calls

_BESIDE = 1e9  # bytes beside the buffers: results, what is made on the way to a buffer, a graph's own


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to time. `make` gives, by implementation, calls on buffers that take turns, given how many of these.

    `nbytes` are what each implementation must move; the first is ours.
    """

    op: str
    sizes: dict[str, Any]
    nbytes: dict[str, int]
    make: Callable[[int], dict[str, Calls]]

    def buffer_bytes(self, count: int) -> float:
        """Bytes of all buffers where `count` of the smallest take turns: those of larger ones are fewer."""
        return _BESIDE + sum(max(each, count * min(self.nbytes.values())) for each in self.nbytes.values())

    @property
    def name(self) -> str:
        """The operation and its sizes."""
        return f"{self.op} {' '.join(f'{key}={value}' for key, value in self.sizes.items())}"


def random_bf16(*shape: int, device: torch.device) -> Tensor:
    """Numbers as small as weights are."""
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
