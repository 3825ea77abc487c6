"""A second decoder of the same tensors, perhaps with other linears in some blocks."""

from collections.abc import Mapping

from exeunt.compression.block import Block
from exeunt.compression.decoder import Decoder
from exeunt.compression.linear import Linear
from exeunt.compression.resident_blocks import ResidentBlocks
from exeunt.kernels.blocks import NativeBlocks


def block_linears(decoder: Decoder, block: int) -> dict[str, Linear]:
    """One block's linears by canonical name, in the order in which a token passes them."""
    return resident_blocks(decoder)[block].linears()


def resident_blocks(decoder: Decoder) -> list[Block]:
    """A decoder's blocks as they were read, a replaced one too."""
    assert isinstance(decoder._blocks, ResidentBlocks)
    return [block for block in decoder._blocks.unreplaced.blocks if isinstance(block, Block)]


def twin(decoder: Decoder, replaced: Mapping[int, Mapping[str, Linear]] | None = None) -> Decoder:
    """A decoder of the same tensors, with `replaced` linears, by block and canonical name, in their place."""
    blocks = resident_blocks(decoder)
    for index, linears in (replaced or {}).items():
        blocks[index] = blocks[index].with_linears(linears)
    return Decoder(
        decoder.spec,
        decoder._embedding,
        decoder._output,
        ResidentBlocks(decoder.spec, blocks, decoder._rope, decoder.device, decoder.dtype),
        decoder._rope,
        exit_output=decoder._project_exit.linear,
        linear_block=decoder.linear_block,
    )


def native_of(decoder: Decoder) -> NativeBlocks | None:
    """What the native kernel knows a decoder's blocks by."""
    assert isinstance(decoder._blocks, ResidentBlocks)
    return decoder._blocks.native
