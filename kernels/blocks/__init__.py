"""Consecutive transformer blocks in one native call."""

from exeunt.kernels.blocks.native import BlockParts, BlockShape, NativeBlocks, NormWeights, PageRange

__all__ = ["BlockParts", "BlockShape", "NativeBlocks", "NormWeights", "PageRange"]
