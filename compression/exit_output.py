"""The output matrix as a model's exits read it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from exeunt.compression.linear import Linear
from exeunt.compression.native_matrix import NotNativeError, native_matrix
from exeunt.kernels.native.descriptors import Matrix


@dataclass(frozen=True, slots=True, eq=False)
class ExitOutput:
    """Maps an exit's states [K, hidden] to logits [K, vocab] float32.

    `matrix` describes `linear` to the native gate, None where that cannot read it.
    """

    linear: Linear
    dtype: torch.dtype  # of the states
    matrix: Matrix | None = field(init=False, repr=False)
    _held: list[Tensor] = field(init=False, repr=False, default_factory=list)  # what `matrix` points into

    def __post_init__(self) -> None:
        try:
            matrix = native_matrix(self.linear, self.dtype, self._held)
        except NotNativeError:
            matrix = None
        object.__setattr__(self, "matrix", matrix)

    def __call__(self, state: Tensor) -> Tensor:
        return self.linear(state).float()
