"""Which launches a search tries for a linear layer's call: a few tiles by the number of rows, parts apart or not."""

from typing import Final

from exeunt.kernels.linear_parts import launch_for, parts_of
from exeunt.kernels.linear_tiles import Tile
from exeunt.kernels.tuned.launches import TunedLaunch, forced
from exeunt.kernels.tuned.shape import LinearShape

_FULL: Final = {
    1: (Tile(8, 64, 4), Tile(8, 64, 6), Tile(8, 128, 4)),
    16: (Tile(16, 64, 4), Tile(16, 64, 6), Tile(16, 128, 4)),
    32: (Tile(32, 64, 4), Tile(32, 64, 3, 4), Tile(32, 128, 3, 4), Tile(64, 64, 3, 4)),
    64: (Tile(64, 64, 3, 4), Tile(64, 64, 4, 4), Tile(64, 128, 3, 4), Tile(64, 128, 4, 8)),
    128: (
        Tile(64, 64, 3, 4),
        Tile(64, 64, 4, 4),
        Tile(64, 128, 3, 4),
        Tile(64, 128, 4, 8),
        Tile(128, 64, 3, 4),
        Tile(128, 128, 3, 8),
        Tile(128, 128, 4, 8),
    ),
}
_INT4: Final = {
    1: (Tile(8, 64, 3), Tile(8, 64, 4), Tile(8, 128, 3), Tile(8, 32, 4, 1), Tile(8, 64, 4, 1)),
    16: (Tile(16, 64, 3), Tile(16, 64, 4), Tile(16, 32, 4)),
    32: (Tile(32, 64, 2), Tile(32, 64, 3), Tile(16, 64, 4)),
}
"""By the fewest rows that they are tried for, up to the next. INT4 tiles have two warps or one, whatever is tried:
see `exeunt.kernels.linear_parts`."""
_MOST_SCRATCH: Final = (
    2**27
)  # bytes of parts' sums in memory: more cannot be fast, and graphs would hold them


def candidates(shape: LinearShape, rows: int) -> list[TunedLaunch]:
    """The launches to try for a call of `rows` rows, the rule's own left out."""
    tiles = _INT4 if shape.int4 else _FULL
    chosen = tiles[max(fewest for fewest in tiles if fewest <= rows)]
    by_rule = _run_as(shape, rows, None)
    found = [TunedLaunch(tile, split) for tile in chosen for split in (True, False)]
    return [launch for launch in found if _fits(shape, rows, launch) and launch != by_rule]


def _fits(shape: LinearShape, rows: int, launch: TunedLaunch) -> bool:
    """Whether a launch is what it says: parts apart only where there are some, and memory to leave their sums in."""
    if not launch.split:
        return True
    scratch = 4 * parts_of(shape.in_features) * rows * shape.out_features
    return scratch <= _MOST_SCRATCH and _run_as(shape, rows, launch) == launch


def _run_as(shape: LinearShape, rows: int, launch: TunedLaunch | None) -> TunedLaunch:
    """What a call comes down to that is told to run with `launch`, None: by the rule."""
    outputs = shape.out_features // 2 if shape.gated else shape.out_features
    with forced(launch):
        made = launch_for(rows, shape.in_features, outputs, shape.gated, shape.dtype, int4=shape.int4)
    return TunedLaunch(made.tile, made.split)
