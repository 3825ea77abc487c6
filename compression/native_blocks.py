"""A decoder's blocks handed to the native kernel that runs many of them in one call."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from exeunt.compression.architecture import Architecture
from exeunt.compression.block import Block
from exeunt.compression.linear import FullLinear
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.native_matrix import NotNativeError, native_address, native_matrix
from exeunt.compression.norm import Norm
from exeunt.kernels.blocks import OWN_ROWS_WORK, BlockParts, BlockShape, NativeBlocks, NormWeights
from exeunt.kernels.blocks.native import ACTIVATION_CODES
from exeunt.kernels.native.library import DTYPE_CODES, native_library

_NO_WINDOW = 1 << 62


def native_blocks(
    spec: Architecture, blocks: Sequence[Block | LinearBlock], device: torch.device, dtype: torch.dtype
) -> NativeBlocks | None:
    """Consecutive blocks for the native kernel, or None where it cannot run all of them on this device.

    A linear block stands in the place of the block that it replaces.

    The weights are not copied. A linear of another class than this project's two (one that records what it is given,
    say) makes the answer None, and the blocks run one operation at a time.
    """
    library = native_library() if device.type == "cpu" else None
    if library is None or dtype not in DTYPE_CODES or spec.activation not in ACTIVATION_CODES:
        return None
    parts = (BlockParts * len(blocks))()
    held: list[Tensor] = []
    try:
        for place, block in enumerate(blocks):
            _describe(parts[place], block, dtype, held)
    except NotNativeError:
        return None
    widest = max(max(part.qkv.outputs, part.up.outputs) for part in parts)
    # one vector more: the key rows of a packed matrix may begin inside a panel
    return NativeBlocks(library, dtype, _shape(spec, widest + library.lanes), parts, tuple(held))


def _shape(spec: Architecture, widest: int) -> BlockShape:
    return BlockShape(
        hidden=spec.hidden_size,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        inner=spec.intermediate_size,
        gated=int(spec.gated),
        activation=ACTIVATION_CODES[spec.activation],
        layer_norm=int(spec.norm == "layer"),
        eps=spec.norm_eps,
        widest=widest,
        own_rows_work=OWN_ROWS_WORK,
    )


def _describe(parts: BlockParts, block: Block | LinearBlock, dtype: torch.dtype, held: list[Tensor]) -> None:
    """Fill in one block's parts; raises NotNativeError."""
    if isinstance(block, LinearBlock):
        parts.is_linear_map = 1
        parts.qkv = native_matrix(FullLinear(block.down), dtype, held)
        parts.out = native_matrix(FullLinear(block.up, block.bias), dtype, held)
        return
    parts.attention_norm = _norm(block.attention_norm, dtype, held)
    parts.mlp_norm = _norm(block.mlp_norm, dtype, held)
    if block.head_norm is not None:
        parts.head_norm = native_address(block.head_norm, dtype, held)
    parts.qkv, parts.out, parts.up, parts.down = (
        native_matrix(linear, dtype, held) for linear in (block.qkv, block.out, block.up, block.down)
    )
    parts.window = _NO_WINDOW if block.window is None else block.window
    parts.scale = ctypes.c_double(block.scale)


def _norm(norm: Norm, dtype: torch.dtype, held: list[Tensor]) -> NormWeights:
    bias = None if norm.bias is None else native_address(norm.bias, dtype, held)
    return NormWeights(native_address(norm.weight, dtype, held), bias)
