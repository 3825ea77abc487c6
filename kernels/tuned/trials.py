"""Calls of linear layers on a GPU, for the search to run and time: random weights that take turns in memory."""

import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import Final

import torch
from torch import Tensor

from exeunt.kernels.full_linear.triton import full_linear_triton
from exeunt.kernels.int4_linear.pairs import PairedInt4, pairs_of
from exeunt.kernels.int4_linear.triton import int4_linear_triton
from exeunt.kernels.linear_rule import tiles
from exeunt.kernels.timing import copies, timed
from exeunt.kernels.tuned.launches import Key, TunedLaunch, forced
from exeunt.kernels.tuned.search import Search, search
from exeunt.kernels.tuned.shape import LinearShape

_REPLAYS: Final = 7
_SCALE: Final = 64
"""Of inputs whose sums are compared to the last bit: those of small ones float16 could not show."""
_COMPILERS: Final = 8  # threads that compile side by side


class TimedLinear:
    """One call of a layer with random weights, enough of them that no cache holds one when its turn comes again."""

    def __init__(self, shape: LinearShape, rows: int, device: torch.device) -> None:
        self._device = device
        self._x = torch.randn(rows, shape.in_features, device=device).to(shape.dtype)
        made = partial(_int4 if shape.int4 else _full, shape, device)
        weights = [made() for _ in range(copies(shape.weight_bytes))]
        self._calls = [partial(_called, self._x, weight, gated=shape.gated) for weight in weights]
        self._product = partial(_product, _SCALE * self._x, weights[0])

    def prepare(self, launches: Sequence[TunedLaunch], left: Callable[[], float]) -> None:
        """See `Trial`: in threads, since a compiler works outside of Python for most of its time."""
        with ThreadPoolExecutor(min(_COMPILERS, os.cpu_count() or 1)) as threads:
            for _ in threads.map(partial(self._compile, left), launches):
                pass

    def result(self, launch: TunedLaunch | None) -> Tensor:
        """See `Trial`."""
        with torch.cuda.device(self._device), torch.inference_mode(), forced(launch):
            return self._calls[0]()

    def low_bits(self, launch: TunedLaunch | None) -> Tensor:
        """See `Trial`."""
        less = -self._rules_sums
        with torch.cuda.device(self._device), torch.inference_mode(), forced(launch):
            return self._product(less)[0]

    @cached_property
    def _rules_sums(self) -> Tensor:
        with torch.cuda.device(self._device), torch.inference_mode(), forced(None):
            return first_sums(self._product)

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


def search_on(
    device: torch.device,
    shapes: Sequence[LinearShape],
    seconds: float,
    known: Container[Key] = (),
    used: Mapping[Key, TunedLaunch | None] | None = None,
) -> Search:
    """The fastest launches on a GPU for calls of `shapes`, as far as so many seconds reach; see `search`."""
    with torch.cuda.device(device), _memory_given_back():
        return search(
            shapes,
            seconds,
            lambda shape, rows: TimedLinear(shape, rows, device),
            most_warps=tiles().most_warps,
            known=known,
            used=used,
        )


def first_sums(product: Callable[[Tensor | None], Tensor]) -> Tensor:
    """The first row's sums [outputs] in float32, out of a product that adds a bias to them and rounds to 16 bits.

    What was read of the sums is taken from them, and what is left is read: twice, until there is nothing in bfloat16.
    float16 leaves what is below its smallest numbers.
    """
    sums = product(None)[0].float()
    for _ in range(2):
        sums = sums + product(-sums)[0].float()
    return sums


@contextmanager
def _memory_given_back() -> Iterator[None]:
    """What is allocated inside is not kept by PyTorch: a cache of keys and values is sized by what is free."""
    try:
        yield
    finally:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _called(
    x: Tensor, weight: Tensor | PairedInt4, *, gated: bool = False, bias: Tensor | None = None
) -> Tensor:
    activation = "silu" if gated else None
    if isinstance(weight, Tensor):
        return full_linear_triton(x, weight, bias, activation=activation, gated=gated)
    return int4_linear_triton(x, weight, bias, activation=activation, gated=gated)


def _product(x: Tensor, weight: Tensor | PairedInt4, bias: Tensor | None) -> Tensor:
    """The product as it is, whatever the layer makes of it; the bias is of float32, and added before it is rounded."""
    return _called(x, weight, bias=bias)


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
