"""Consecutive transformer blocks in one native call."""

from exeunt.kernels.blocks.native import (
    TILE_TOKENS,
    BlockParts,
    BlockShape,
    NativeBlocks,
    NormWeights,
    PageRange,
)

__all__ = ["TILE_TOKENS", "BlockParts", "BlockShape", "NativeBlocks", "NormWeights", "PageRange"]
