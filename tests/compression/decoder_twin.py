"""A second decoder of the same tensors, perhaps with other linears in some blocks."""

from collections.abc import Mapping

from exeunt.compression.decoder import Decoder
from exeunt.compression.linear import Linear


def block_linears(decoder: Decoder, block: int) -> dict[str, Linear]:
    """One block's linears by canonical name, in the order in which a token passes them."""
    return decoder._blocks[block].linears()


def twin(decoder: Decoder, replaced: Mapping[int, Mapping[str, Linear]] | None = None) -> Decoder:
    """A decoder of the same tensors, with `replaced` linears, by block and canonical name, in their place."""
    blocks = list(decoder._blocks)
    for index, linears in (replaced or {}).items():
        blocks[index] = blocks[index].with_linears(linears)
    return Decoder(
        decoder.spec,
        decoder._embedding,
        decoder._output,
        blocks,
        decoder._rope,
        exit_output=decoder._project_exit.linear,
        linear_block=decoder.linear_block,
    )
