"""Graphs without a GPU: a replay does again what was captured, and leaves it in the same tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from exeunt.compression.graph_pool import Captured, GraphPool

GROWN = 1000
TOTAL = 1_000_000_000


class FakePool(GraphPool):
    """Captures on the CPU; `failing` captures fail, and `free` of a gigabyte are free."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.failing, self.free = False, TOTAL
        self.captures = 0

    def _memory(self) -> tuple[int, int]:
        return self.free, TOTAL

    def _record(self, run: Callable[[], Any]) -> Captured[Any]:
        self.captures += 1
        if self.failing:
            raise RuntimeError("out of memory\nand much more")
        run()
        result = run()

        def replay() -> None:
            for kept, found in zip(_tensors(result), _tensors(run()), strict=True):
                kept.copy_(found)

        replay()  # as on a GPU: a first launch belongs to the capture
        return Captured(replay, result, GROWN)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    """What a run leaves."""
    if isinstance(result, Tensor):
        return (result,)
    return result if isinstance(result, tuple) else ()
