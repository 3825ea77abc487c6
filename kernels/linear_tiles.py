"""The tile of a linear layer's GPU kernel: sizes that decide how fast it runs, and no bit of what comes out."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile's sizes. None changes a result: each sum is the tensor cores' own, over the same inputs in one order."""

    rows: int
    outputs: int  # half of them gate and half of them up where the layer is gated
    stages: int  # steps of weights on the way at once
    warps: int = 2
