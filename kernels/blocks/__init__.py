"""Consecutive transformer blocks in one native call."""

from exeunt.kernels.blocks.native import BlockParts, BlockShape, Matrix, NativeBlocks, NormWeights, PageRange

__all__ = ["BlockParts", "BlockShape", "Matrix", "NativeBlocks", "NormWeights", "PageRange"]
