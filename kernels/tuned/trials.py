"""Calls of linear layers on a GPU, for the search to run and time: random weights that take turns in memory."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Final

import torch
from torch import Tensor

from exeunt.kernels.full_linear.triton import full_linear_triton
from exeunt.kernels.int4_linear.pairs import PairedInt4, pairs_of
from exeunt.kernels.int4_linear.triton import int4_linear_triton
from exeunt.kernels.timing import copies, timed
from exeunt.kernels.tuned.launches import TunedLaunch, forced
from exeunt.kernels.tuned.search import Search, search
from exeunt.kernels.tuned.shape import LinearShape

_REPLAYS: Final = 7
_COMPILERS: Final = 8  # threads that compile side by side


class TimedLinear:
    """One call of a layer with random weights, enough of them that no cache holds one when its turn comes again."""

    def __init__(self, shape: LinearShape, rows: int, device: torch.device) -> None:
        self._device = device
        self._x = torch.randn(rows, shape.in_features, device=device).to(shape.dtype)
        activation = "silu" if shape.gated else None
        run = partial(_int4 if shape.int4 else _full, shape, device)
        self._calls = [
            partial(_called, self._x, run(), activation, shape.gated)
            for _ in range(copies(shape.weight_bytes))
        ]

    def prepare(self, launches: Sequence[TunedLaunch], left: Callable[[], float]) -> None:
        """See `Trial`: in threads, since a compiler works outside of Python for most of its time."""
        with ThreadPoolExecutor(min(_COMPILERS, os.cpu_count() or 1)) as threads:
            for _ in threads.map(partial(self._compile, left), launches):
                pass

    def result(self, launch: TunedLaunch | None) -> Tensor:
        """See `Trial`."""
        with torch.cuda.device(self._device), torch.inference_mode(), forced(launch):
            return self._calls[0]()

    def seconds(self, launch: TunedLaunch | None) -> float:
        """See `Trial`. Raises RuntimeError where it cannot be timed as it runs in a server, in a graph."""
        with torch.cuda.device(self._device), torch.inference_mode(), forced(launch):
            took = timed(self._calls, self._device, replays=_REPLAYS)
        if took.method != "graph":
            raise RuntimeError(f"it was timed by {took.method}, not in a graph")
        return took.seconds

    def _compile(self, left: Callable[[], float], launch: TunedLaunch) -> None:
        if left() > 0:
            with suppress(Exception):  # `result` meets it again, and tells
                self.result(launch)


def search_on(device: torch.device, shapes: Sequence[LinearShape], seconds: float) -> Search:
    """The fastest launches on a GPU for calls of `shapes`, as far as so many seconds reach; see `search`."""
    with torch.cuda.device(device), _memory_given_back():
        return search(shapes, seconds, lambda shape, rows: TimedLinear(shape, rows, device))


@contextmanager
def _memory_given_back() -> Iterator[None]:
    """What is allocated inside is not kept by PyTorch: a cache of keys and values is sized by what is free."""
    try:
        yield
    finally:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _called(x: Tensor, weight: Tensor | PairedInt4, activation: str | None, gated: bool) -> Tensor:
    if isinstance(weight, Tensor):
        return full_linear_triton(x, weight, activation=activation, gated=gated)
    return int4_linear_triton(x, weight, activation=activation, gated=gated)


def _full(shape: LinearShape, device: torch.device) -> Tensor:
    weight = torch.empty(shape.out_features, shape.in_features, dtype=shape.dtype, device=device)
    return weight.normal_(0, 0.02)


def _int4(shape: LinearShape, device: torch.device) -> PairedInt4:
    """A weight of random codes, with scales and offsets as of weights that are as small as real ones."""
    pairs, outputs, group = (
        pairs_of(shape.in_features, shape.group_size),
        shape.out_features,
        shape.group_size,
    )
    codes = torch.randint(256, (pairs, outputs, group), dtype=torch.uint8, device=device)
    scales = torch.rand(pairs, 2, outputs, device=device).half() / 100
    params = torch.stack((scales, -7.5 * scales), dim=-1).view(torch.int32).squeeze(-1)
    return PairedInt4(codes, params, group, shape.in_features, outputs)
