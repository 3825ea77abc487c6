"""The rule by which a linear layer's GPU call gets its tile, and by which the parts of its sum stay together.

Where a launch was measured (`exeunt.kernels.tuned`) that stands; the rule has the rest. Tiles and who sums a part
decide how fast a call is, and no bit of it; into how many parts a sum is cut is the same for all
(`linear_parts.parts_of`).
"""

from dataclasses import dataclass, replace
from typing import Final

import torch
import triton

from exeunt.kernels.arithmetic_triton import INTERPRETED
from exeunt.kernels.linear_tiles import Tile

_MOST_WARPS: Final = 8  # of a program


@dataclass(frozen=True, slots=True)
class LinearTiles:
    """The sizes that the kernels run with; `most_parts` and `part_inputs` say how sums are cut, the others how fast."""

    full: tuple[Tile, ...] = (Tile(8, 64, 4), Tile(16, 64, 4), Tile(32, 64, 4), Tile(64, 64, 3, 4))
    full_wide: Tile = Tile(128, 128, 4, 8)  # for more rows, where there are many tiles even so
    int4: tuple[Tile, ...] = (Tile(8, 64, 4), Tile(16, 64, 3), Tile(32, 64, 3), Tile(64, 128, 3, 8))
    int4_wide: Tile = Tile(8, 128, 3)  # for few rows, where there are many parts of tiles even so
    int4_tall: Tile = Tile(128, 64, 3, 4)  # for more rows, where there are many tiles even so
    float32: tuple[Tile, ...] = (Tile(16, 64, 4),)  # no tensor cores: more would not fit the registers
    most_parts: int = 8
    part_inputs: int = 256  # inputs of a part at least
    many_wide_tiles: int = 128
    many_wide_parts: int = 1056
    tiles_to_fill: int = (
        264  # tiles from which on one program sums all parts: two a multiprocessor of an H200
    )
    int4_tiles_to_flood: int = 1056  # the same for few rows of INT4, whose tiles take longer to begin
    split_rows: int = 4  # rows up to which parts are cheap to leave in memory, compared with the weights

    @property
    def most_warps(self) -> int:
        """The most warps of a tile: that tiles of more have the same bits is known of no GPU with these sizes."""
        tiles = (*self.full, self.full_wide, *self.int4, self.int4_wide, self.int4_tall)
        return max(tile.warps for tile in tiles)

    def tile_for(
        self, tokens: int, in_features: int, outputs: int, dtype: torch.dtype, *, int4: bool
    ) -> Tile:
        """The tile for so many rows and outputs of the weight."""
        if dtype == torch.float32:
            return self.float32[0]
        parts = min(self.most_parts, in_features // self.part_inputs)
        few = _count(self.int4_wide, tokens, outputs) * parts >= self.many_wide_parts
        if int4 and tokens <= self.int4_wide.rows and few:
            return self.int4_wide
        tiles, large = (self.int4, self.int4_tall) if int4 else (self.full, self.full_wide)
        if tokens > tiles[-1].rows and _count(large, tokens, outputs) >= self.many_wide_tiles:
            return large
        return next((tile for tile in tiles if tile.rows >= tokens), tiles[-1])

    def splits(self, tokens: int, tiles: int, tile: Tile, *, int4: bool) -> bool:
        """Whether each part of so many tiles' sums has a program of its own."""
        if tile in (self.full_wide, self.int4_tall):
            return False
        if tile.warps == _MOST_WARPS:  # few of them keep the GPU busy, and their parts are large to leave
            return tiles < self.tiles_to_fill // 4
        few = int4 and tokens <= self.split_rows
        return tiles < (self.int4_tiles_to_flood if few else self.tiles_to_fill)


TILES: Final = LinearTiles()
# Of two warps, and as small as the shared memory of all GPUs: nobody has measured others, or compared their bits.
OTHER_TILES: Final = replace(
    TILES,
    full=(*TILES.full[:-1], Tile(64, 64, 4)),
    full_wide=Tile(128, 64, 2),
    int4=TILES.int4[:-1],
    int4_tall=Tile(64, 64, 2),
    many_wide_tiles=1 << 62,
)
_HOPPER: Final = 9  # compute capability, before the point


def tiles() -> LinearTiles:
    """The sizes for the GPU that kernels are launched on."""
    if INTERPRETED.value:
        return TILES
    arch = int(triton.runtime.driver.active.get_current_target().arch)
    return TILES if arch // 10 == _HOPPER else OTHER_TILES


def _count(tile: Tile, tokens: int, outputs: int) -> int:
    """Tiles of so many tokens and outputs."""
    return int(triton.cdiv(tokens, tile.rows) * triton.cdiv(outputs, tile.outputs))
