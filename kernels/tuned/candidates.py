"""Which launches a search tries for a linear layer's call: a few tiles by the number of rows, parts apart or not."""

from typing import Final

from exeunt.kernels.linear_parts import launch_for
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
_FULL_TWO_WARPS: Final = {
    1: (Tile(8, 64, 4), Tile(8, 64, 6), Tile(8, 128, 4)),
    16: (Tile(16, 64, 4), Tile(16, 64, 6), Tile(16, 128, 4)),
    32: (Tile(32, 64, 3), Tile(32, 64, 4), Tile(64, 64, 3)),
    64: (Tile(64, 64, 3), Tile(64, 64, 4), Tile(32, 64, 4)),
}
_INT4: Final = {
    1: (
        Tile(8, 64, 3),
        Tile(8, 64, 4),
        Tile(8, 128, 3),
        Tile(8, 128, 4),
        Tile(8, 128, 6),
        Tile(8, 64, 4, 1),
    ),
    16: (Tile(16, 64, 3), Tile(16, 64, 4), Tile(16, 32, 4), Tile(16, 128, 3, 4)),
    32: (Tile(32, 64, 2), Tile(32, 64, 3), Tile(16, 64, 4), Tile(32, 128, 3, 8)),
    64: (Tile(32, 64, 3), Tile(64, 64, 3), Tile(64, 64, 3, 4), Tile(64, 128, 3, 8)),
    128: (Tile(32, 64, 3), Tile(64, 64, 3), Tile(64, 128, 4, 8), Tile(128, 64, 3, 4), Tile(128, 128, 3, 8)),
}
"""By the fewest rows that they are tried for, up to the next. On GPUs where nobody knows the bits of tiles of more than
two warps there are none of these: see `exeunt.kernels.linear_parts`."""


def candidates(shape: LinearShape, rows: int, most_warps: int) -> list[TunedLaunch]:
    """The launches to try for a call of `rows` rows, of so many warps at most, the rule's own left out.

    `most_warps` is what the rule itself uses on that GPU: tiles of more may be summed by other instructions.
    """
    full = _FULL if most_warps > 2 else _FULL_TWO_WARPS
    tiles = _INT4 if shape.int4 else full
    chosen = tiles[max(fewest for fewest in tiles if fewest <= rows)]
    by_rule = _run_as(shape, rows, None)
    found = [TunedLaunch(tile, split) for tile in chosen for split in (True, False)]
    return [
        launch
        for launch in found
        if launch.tile.warps <= most_warps and launch != by_rule and _run_as(shape, rows, launch) == launch
    ]


def _run_as(shape: LinearShape, rows: int, launch: TunedLaunch | None) -> TunedLaunch:
    """What a call comes down to that is told to run with `launch`, None: by the rule."""
    outputs = shape.out_features // 2 if shape.gated else shape.out_features
    with forced(launch):
        made = launch_for(
            rows,
            shape.in_features,
            outputs,
            shape.gated,
            shape.dtype,
            int4=shape.int4,
            group_size=shape.key(rows).group_size,
        )
    return TunedLaunch(made.tile, made.split)
