"""A variant: which compressed form of the model a request runs through; and the names of the formats."""

from dataclasses import dataclass
from typing import Literal

WeightFormat = Literal["int4", "full"]
KVFormat = Literal["int4", "full"]
SkippedKV = Literal["backfill", "propagate"]
"""What becomes of the keys and values of blocks that a token skips: computed later, or from its state at the exit."""


@dataclass(frozen=True, slots=True, order=True)
class Variant:
    """The part of a request's compression that decides which tensors it runs through.

    Rows of different variants never share a tick; exit mode and thresholds are per row and do.
    """

    weights: WeightFormat = "full"
    kv_cache: KVFormat = "full"
    linear_block: bool = False

    @property
    def short_name(self) -> str:
        """What tables call it: weights/KV, then the linear block."""
        return f"{self.weights}/{self.kv_cache}" + (" linear" if self.linear_block else "")

    def __str__(self) -> str:
        return (
            f"weights={self.weights} kv_cache={self.kv_cache} linear_block={str(self.linear_block).lower()}"
        )
