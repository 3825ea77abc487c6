"""A second decoder of the same tensors, to change without touching the first."""

from exeunt.compression.decoder import Decoder


def twin(decoder: Decoder) -> Decoder:
    """A decoder of the same tensors whose linears can be replaced without touching those of `decoder`."""
    return Decoder(
        decoder.spec,
        decoder._embedding,
        decoder._output,
        list(decoder._blocks),
        decoder._rope,
        exit_output=decoder._project_exit.linear,
        linear_block=decoder.linear_block,
    )
