"""A linear layer, whatever its weights are stored in: full precision or INT4, with one face."""

from dataclasses import replace
from typing import Literal, Protocol

from torch import Tensor

from exeunt.kernels.full_linear import full_linear
from exeunt.kernels.int4_linear import Int4Weight, PackedWeight, PairedInt4, int4_linear, pack, pick
from exeunt.kernels.rows.norm import RowNorm


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

    def fused(
        self,
        x: Tensor,
        *,
        norm: RowNorm | None = None,
        activation: str | None = None,
        gated: bool = False,
        residual: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The layer with what stands around it, in Triton: [tokens, out] for x [tokens, in], rounded once by each step.

        `norm` is applied to x first; `activation` to the output, or, where that is `gated`, to its first half, which
        then multiplies the second; to `residual` [tokens, out] the result is added in place. Rows whose position in
        `positions` [tokens] int64 is below 0 are missing: nobody may read their results, nor those rows of `residual`
        from then on, and where enough rows beside each other are missing the weights are not read for them.
        """
        ...

    def rows(self, start: int, stop: int) -> "Linear":
        """The layer of outputs `start` to `stop` - 1 alone, sharing this one's tensors."""
        ...

    def pick(self, outputs: Tensor) -> "Linear":
        """The layer of some outputs alone, [n] int64 in the order wanted: copies of this one's weights."""
        ...


class FullLinear:
    """A linear layer in the model's own dtype."""

    __slots__ = ("bias", "format", "in_features", "out_features", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.format: Literal["full", "int4"] = "full"
        self.weight = weight  # [out, in]
        self.bias = bias
        self.out_features, self.in_features = int(weight.shape[0]), int(weight.shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias: x [..., in] in the weight's dtype gives [..., out] in the same."""
        return full_linear(x, self.weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Add the output for x [tokens, in] to `residual` [tokens, out] of the same dtype in place, and return it."""
        return residual.add_(full_linear(x, self.weight, self.bias))

    def fused(
        self,
        x: Tensor,
        *,
        norm: RowNorm | None = None,
        activation: str | None = None,
        gated: bool = False,
        residual: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """See `Linear`."""
        from exeunt.kernels.full_linear.triton import (
            full_linear_triton,
        )  # Triton is there only where a GPU is

        return full_linear_triton(
            x,
            self.weight,
            self.bias,
            norm=norm,
            activation=activation,
            gated=gated,
            residual=residual,
            positions=positions,
        )

    def rows(self, start: int, stop: int) -> "FullLinear":
        """The layer of outputs `start` to `stop` - 1: views of this one's weight and bias, no copies."""
        return FullLinear(self.weight[start:stop], self.bias[start:stop] if self.bias is not None else None)

    def pick(self, outputs: Tensor) -> "FullLinear":
        """The layer of some outputs alone, [n] int64 in the order wanted: copies of this one's weight and bias."""
        return FullLinear(self.weight[outputs], None if self.bias is None else self.bias[outputs])

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, the bias not counted."""
        return self.weight.nbytes


class Int4Linear:
    """A linear layer with INT4 weights, held only in the layout that the device's kernel reads."""

    __slots__ = ("bias", "format", "in_features", "out_features", "skipped", "weight")

    def __init__(self, weight: Int4Weight, bias: Tensor | None = None) -> None:
        self._hold(pack(weight), bias, 0)

    def __call__(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias by the device's INT4 kernel: x [..., in] gives [..., out] in x's dtype."""
        out = int4_linear(x, self.weight, self.bias)
        return out[..., self.skipped :] if self.skipped else out

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Add the output for x [tokens, in] to `residual` [tokens, out] in place, and return it."""
        return residual.add_(self(x))

    def fused(
        self,
        x: Tensor,
        *,
        norm: RowNorm | None = None,
        activation: str | None = None,
        gated: bool = False,
        residual: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """See `Linear`."""
        from exeunt.kernels.int4_linear.triton import (
            int4_linear_triton,
        )  # Triton is there only where a GPU is

        return int4_linear_triton(
            x,
            self.weight,
            self.bias,
            norm=norm,
            activation=activation,
            gated=gated,
            residual=residual,
            positions=positions,
        )

    def rows(self, start: int, stop: int) -> "Int4Linear":
        """The layer of outputs `start` to `stop` - 1, sharing this one's bytes.

        A weight packed for the CPU is cut where one of its panels begins; outputs in front of `start` are computed and
        dropped. The kernels compute an output alike whatever stands beside it: the results are the whole layer's bits.
        """
        weight, first = _rows_from(self.weight, start + self.skipped, stop + self.skipped)
        bias = self.bias[first : stop + self.skipped] if self.bias is not None else None
        part = Int4Linear.__new__(Int4Linear)
        part._hold(weight, bias, start + self.skipped - first)
        return part

    def pick(self, outputs: Tensor) -> "Int4Linear":
        """The layer of some outputs alone, [n] int64 in the order wanted: copies of this one's codes and bias.

        With the CPU's and the GPU's kernel its results are the whole layer's bits.
        """
        part = Int4Linear.__new__(Int4Linear)
        part._hold(
            pick(self.weight, outputs + self.skipped),
            None if self.bias is None else self.bias[outputs + self.skipped],
            0,
        )
        return part

    def _hold(self, weight: PackedWeight, bias: Tensor | None, skipped: int) -> None:
        self.format: Literal["full", "int4"] = "int4"
        self.weight = weight
        self.bias = bias
        self.in_features = weight.in_features
        self.out_features = weight.out_features - skipped
        self.skipped = skipped  # outputs of `weight` in front of this layer's

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets in the layout held, the bias not counted."""
        return self.weight.nbytes


def _rows_from(weight: PackedWeight, start: int, stop: int) -> tuple[PackedWeight, int]:
    """A weight that holds outputs `start` to `stop` - 1 behind a few others, and the first output it holds."""
    if isinstance(weight, Int4Weight):
        codes, scales, offsets = (t[start:stop] for t in (weight.codes, weight.scales, weight.offsets))
        size = stop - start
        return replace(weight, codes=codes, scales=scales, offsets=offsets, out_features=size), start
    if isinstance(weight, PairedInt4):
        return weight.rows(start, stop), start
    lanes = weight.library.lanes
    first = start // lanes
    panels = weight.panels[first : -(-stop // lanes)]
    return replace(weight, panels=panels, out_features=stop - first * lanes), first * lanes
