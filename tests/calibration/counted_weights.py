"""Weights that count how often each block is read."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from exeunt.compression.checkpoint import open_checkpoint
from exeunt.compression.decoder import Decoder
from exeunt.compression.weights import WeightSource


class CountedWeights:
    """A source that notes every block it is asked for in `asked`."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self.asked: list[int] = []

    def shared(self) -> Mapping[str, Tensor]:
        """The tensors outside the blocks."""
        return self._source.shared()

    def block(self, index: int) -> Mapping[str, Tensor]:
        """One block's tensors, noted."""
        self.asked.append(index)
        return self._source.block(index)


def streamed_decoder(checkpoint: Path) -> tuple[Decoder, CountedWeights]:
    """A decoder that reads each block when it is run, and what it has read since it was made."""
    opened = open_checkpoint(checkpoint)
    weights = CountedWeights(opened.weights())
    decoder = Decoder.from_weights(opened.spec, weights, dtype=torch.float32, streamed=True)
    weights.asked.clear()
    return decoder, weights
