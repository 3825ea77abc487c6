"""A norm as a description: what a kernel that reads rows applies to them first."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowNorm:
    """RMS norm (no bias) or layer norm of rows [..., n], in the rounding order of `exeunt.kernels.rows`."""

    kind: Literal["rms", "layer"]
    weight: Tensor  # [n]
    bias: Tensor | None  # [n], layer norms only
    eps: float

    def __post_init__(self) -> None:
        if self.kind == "rms" and self.bias is not None:
            raise ValueError("an RMS norm has no bias")
