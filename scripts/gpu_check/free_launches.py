"""What one order of summation costs: the same kernels with tile and parts chosen freely for a number of rows.

A sum's parts are cut by the number of inputs alone, so that a row has the same bits in any company. Here they are cut
anew for every number of rows, among a few ways, and the fastest is what our own kernels would reach without that
promise. Nothing else runs with what is found: it would change results.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from unittest.mock import patch

import torch

from exeunt.kernels import linear_parts
from exeunt.kernels.linear_rule import TILES, tiles
from exeunt.kernels.timing import Calls, timed
from exeunt.kernels.tuned.candidates import candidates
from exeunt.kernels.tuned.launches import TunedLaunch, forced
from exeunt.kernels.tuned.shape import LinearShape
from scripts.gpu_check.report import Found

_PARTS = (2, 4, 8)
"""Parts that have programs of their own."""
_REPLAYS = 5


@dataclass(frozen=True, slots=True)
class FreeLaunch:
    """A launch, and into how many parts its sums are cut."""

    launch: TunedLaunch
    parts: int


def free_launches(shape: LinearShape, rows: int) -> list[FreeLaunch]:
    """The ways to try: the tiles that a search for bits of the rule tries too, and the rule's own, by parts."""
    with forced(None):
        by_rule = linear_parts.launch_for(
            rows,
            shape.in_features,
            shape.out_features // (2 if shape.gated else 1),
            shape.gated,
            shape.dtype,
            int4=shape.int4,
            group_size=shape.key(rows).group_size,
        )
    chosen = [by_rule.tile, *(launch.tile for launch in candidates(shape, rows, tiles().most_warps))]
    split = [parts for parts in _PARTS if shape.in_features // parts >= TILES.part_inputs]
    return [
        FreeLaunch(TunedLaunch(tile, parts > 1), parts)
        for tile in dict.fromkeys(chosen)
        for parts in (1, *split)
    ]


def fastest_free(
    calls: Calls, shape: LinearShape, rows: int, device: torch.device, left: Callable[[], float]
) -> Found:
    """The fastest of these ways for `calls` of the layer with so many rows, as far as the seconds `left` reach.

    Raises RuntimeError where none ran.
    """
    ways, times, failed = free_launches(shape, rows), dict[FreeLaunch, float](), 0
    for way in ways:
        if times and left() <= 0:
            break
        try:
            with chosen(way):
                times[way] = timed(calls, device, replays=_REPLAYS).seconds
        except Exception:  # noqa: BLE001 - a tile that this GPU has no room for: another will do
            failed += 1
    if not times:
        raise RuntimeError(f"none of {len(ways)} launches ran")
    best = min(times, key=times.__getitem__)
    with chosen(best):
        took = timed(calls, device)
    return {
        "us": took.seconds * 1e6,
        "method": took.method,
        "tile": list(astuple(best.launch.tile)),
        "parts": best.parts,
        "tried": len(times),
        "failed": failed,
        "ways": len(ways),
    }


@contextmanager
def chosen(way: FreeLaunch) -> Iterator[None]:
    """Have this process's calls run in this way."""
    with forced(way.launch), patch.object(linear_parts, "parts_of", lambda in_features: way.parts):
        yield
