"""Which launch was measured to be the fastest for a linear layer's call, looked up at every launch.

Only how fast a call runs depends on what is found here: how a sum is cut is decided by the inputs alone
(`exeunt.kernels.linear_parts`), and no launch is kept whose result differed from the rule's in a bit.
"""

import os
import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

import torch

from exeunt.kernels.linear_tiles import Tile

MEASURED_ROWS: Final = (1, 8, 16, 32, 64, 128, 512)
"""Rows of the calls that are timed; each stands for those below it, down to the one before."""
_LAST_ROWS: Final = (4, 8, 16, 32, 64, 128)
"""The most rows that each but the last stands for: from 5 rows on parts are dearer to leave in memory."""
DTYPES: Final = (torch.bfloat16, torch.float16)
"""Dtypes that launches are measured for. There is one tile for float32, which has no tensor cores to fill."""


class LaunchKey(NamedTuple):
    """What a launch is measured for."""

    int4: bool
    dtype: torch.dtype
    in_features: int
    outputs: int  # of the weight: gate and up together where the layer is gated
    gated: bool
    group_size: int  # of INT4 weights, by which their kernel's loop is cut; 0 of full ones
    rows: int  # one of MEASURED_ROWS


@dataclass(frozen=True, slots=True)
class TunedLaunch:
    """A tile, and whether each part of the sum has a program of its own (where tiles are few enough to count)."""

    tile: Tile
    split: bool


Key = tuple[bool, torch.dtype, int, int, bool, int, int]
"""A LaunchKey's values: as a plain tuple, which is quicker to make, they find the same."""
Launches = Mapping[Key, TunedLaunch | None]
"""What is known of a GPU; None where the rule was measured to be as fast as anything."""


class _Forced(threading.local):
    """What the calls of a thread are told to run with, in place of what is known."""

    on: bool = False
    launch: TunedLaunch | None = None


_forced = _Forced()
_known: dict[int, Launches] = {}  # by the number of the GPU; what is there is replaced, never changed
_added: dict[int, frozenset[Key]] = {}  # calls of each GPU that this process has found launches of
_changing = threading.RLock()  # whoever changes either, and reads what there is for that


def measured_rows(tokens: int) -> int:
    """The rows of the timed call that stands for one of `tokens` rows."""
    return MEASURED_ROWS[bisect_left(_LAST_ROWS, tokens)]


def tuned_launch(
    tokens: int,
    in_features: int,
    outputs: int,
    gated: bool,
    dtype: torch.dtype,
    *,
    int4: bool,
    group_size: int = 0,
) -> TunedLaunch | None:
    """How to run a call of `tokens` rows on the current GPU, `outputs` being the weight's; None: by the rule.

    There is nothing to find without a GPU, under Triton's interpreter, and with `EXEUNT_TUNED=0`.
    """
    if _forced.on:
        return _forced.launch
    if not _has_gpu():
        return None
    index = torch.cuda.current_device()
    known = _known.get(index)
    if known is None:
        known = known_launches(index)
    return known.get((int4, dtype, in_features, outputs, gated, group_size, measured_rows(tokens)))


def known_launches(index: int) -> Launches:
    """What is known of the GPU numbered `index`: read from its file the first time."""
    known = _known.get(index)
    if known is not None:
        return known
    with _changing:
        if index not in _known:
            from exeunt.kernels.tuned.files import read_known

            _known[index] = read_known(torch.cuda.get_device_name(index)) if is_wanted() else {}
        return _known[index]


def add_launches(index: int, launches: Launches) -> None:
    """Have the GPU numbered `index` run with `launches` too, from the next launch on."""
    with _changing:
        _known[index] = {**known_launches(index), **launches}
        _added[index] = _added.get(index, frozenset()) | launches.keys()


def settled_calls(index: int) -> frozenset[Key]:
    """The calls on the GPU numbered `index` of which a search has nothing more to find.

    Their launches are of these kernels under this compiler; others that are known are used, and may not be the fastest.
    """
    from exeunt.kernels.tuned.files import measured_calls

    kept = measured_calls(torch.cuda.get_device_name(index)) if is_wanted() else frozenset()
    return kept | _added.get(index, frozenset())


def leave_to_rule(key: Key) -> bool:
    """Have calls of `key` on the current GPU run by the rule from now on; whether they did not already.

    Where this thread is told what to run with, nothing changes.
    """
    if _forced.on or not _has_gpu():
        return False
    index = torch.cuda.current_device()
    with _changing:
        if known_launches(index).get(key) is None:
            return False
        add_launches(index, {key: None})
        return True


def is_wanted() -> bool:
    """Whether measured launches are used at all: `EXEUNT_TUNED=0` leaves every launch to the rule."""
    return os.environ.get("EXEUNT_TUNED", "1") != "0"


@contextmanager
def forced(launch: TunedLaunch | None) -> Iterator[None]:
    """Have this thread's calls run with `launch`, None: by the rule, whatever is known."""
    before = _forced.on, _forced.launch
    _forced.on, _forced.launch = True, launch
    try:
        yield
    finally:
        _forced.on, _forced.launch = before


@lru_cache(maxsize=1)
def _has_gpu() -> bool:
    return os.environ.get("TRITON_INTERPRET") != "1" and torch.cuda.is_available()
