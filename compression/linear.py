"""A linear layer, whatever its weights are stored in: full precision or INT4, with one face."""

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.kernels.int4_linear import Int4Weight, PackedWeight, int4_linear, pack


class Linear(Protocol):
    """x [..., in] -> x Wᵀ + bias [..., out]."""

    format: Literal["full", "int4"]
    in_features: int
    out_features: int
    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, the bias not counted."""
        ...

    def __call__(self, x: Tensor) -> Tensor: ...

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Add the layer's output for x [tokens, in] to `residual` [tokens, out] in place, and return it."""
        ...

    def rows(self, start: int, stop: int) -> "Linear":
        """The layer of outputs `start` to `stop` - 1 alone, sharing this one's tensors."""
        ...


class FullLinear:
    """A linear layer in the model's own dtype."""

    __slots__ = ("_transposed", "bias", "format", "in_features", "out_features", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.format: Literal["full", "int4"] = "full"
        self.weight = weight  # [out, in]
        self.bias = bias
        self.out_features, self.in_features = int(weight.shape[0]), int(weight.shape[1])
        # addmm with the residual as its addend saves a call, but keeps the sum in float32 until the end: in 16 bits
        # that is not transformers' rounding order, so only float32 without bias takes it.
        self._transposed = weight.t() if bias is None and weight.dtype == torch.float32 else None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        if self._transposed is not None:
            return residual.addmm_(x, self._transposed)
        return residual.add_(F.linear(x, self.weight, self.bias))

    def rows(self, start: int, stop: int) -> "FullLinear":
        return FullLinear(self.weight[start:stop], self.bias[start:stop] if self.bias is not None else None)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


class Int4Linear:
    """A linear layer with INT4 weights, held only in the layout that the device's kernel reads."""

    __slots__ = ("bias", "format", "in_features", "out_features", "weight")

    def __init__(self, weight: Int4Weight, bias: Tensor | None = None) -> None:
        self.format: Literal["full", "int4"] = "int4"
        self.weight: PackedWeight = pack(weight)
        self.bias = bias
        self.out_features, self.in_features = weight.out_features, weight.in_features

    def __call__(self, x: Tensor) -> Tensor:
        return int4_linear(x, self.weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual.add_(int4_linear(x, self.weight, self.bias))

    def rows(self, start: int, stop: int) -> "Int4Linear":
        bias = self.bias[start:stop] if self.bias is not None else None
        return Int4Linear(int4_rows(self.weight, start, stop), bias)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


def int4_rows(weight: Int4Weight, start: int, stop: int) -> Int4Weight:
    """The INT4 weight of outputs `start` to `stop` - 1: rows are quantised one by one, so a slice is exact."""
    return Int4Weight(
        codes=weight.codes[start:stop],
        scales=weight.scales[start:stop],
        offsets=weight.offsets[start:stop],
        group_size=weight.group_size,
        in_features=weight.in_features,
        out_features=stop - start,
    )
