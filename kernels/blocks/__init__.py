"""Consecutive transformer blocks in one native call."""

from exeunt.kernels.blocks.native import (
    OWN_ROWS_WORK,
    TILE_TOKENS,
    BlockParts,
    BlockShape,
    NativeBlocks,
    NormWeights,
    PageRange,
)

__all__ = [
    "OWN_ROWS_WORK",
    "TILE_TOKENS",
    "BlockParts",
    "BlockShape",
    "NativeBlocks",
    "NormWeights",
    "PageRange",
]
