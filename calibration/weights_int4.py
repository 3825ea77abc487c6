"""The checkpoint's linear layers in INT4: quantised directly, one block at a time, under canonical names.

Direct, because factored forms at equal bits err two to twenty-five times as much (arXiv 2604.20682); uniform, because
the kernels' inner loop is an integer product. `exeunt.calibration.gptq` rounds where second moments of the inputs are
known, `exeunt.kernels.int4_linear.quantize` to nearest where not.

The output matrix is INT4 like the rest: it is what turns the last state into logits under INT4 weights, and what exits
read under any. It too is rounded by GPTQ, for the second moments of the states that the last block gives it. Exits give
it others, normed states of earlier blocks plus their adapter's part, which is trained to make them like those; the
columns "exit" of `python -m scripts.compare_rounding` say what it makes of them. A tied embedding stays in full
precision beside it for the look-up, which reads one row of it per token: rounding it would save no time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import torch
from torch import Tensor

from exeunt.calibration.errors import CalibrationError, OptionError
from exeunt.calibration.gptq import Gptq, gptq, weighted_error
from exeunt.compression.architecture import Architecture
from exeunt.compression.bundle_weights import int4_tensors
from exeunt.compression.checkpoint_names import linear_shapes
from exeunt.kernels.int4_linear import Int4Weight, quantize
from exeunt.kernels.int4_linear.weight import dequantize_rows

Rounding = Literal["gptq", "nearest"]
_ELEMENTS: Final = 1 << 24  # weights compared at once


@dataclass(frozen=True, slots=True)
class Int4Plan:
    """How weights become INT4: in groups of `group_size` inputs, rounded by GPTQ or to nearest.

    `hessian_tokens` of the fit split, in whole rows spread over it, are what GPTQ sees of each layer's inputs.
    """

    group_size: int = 32
    rounding: Rounding = "gptq"
    hessian_tokens: int = 8_000
    gptq: Gptq = field(default_factory=Gptq)


@dataclass(frozen=True, slots=True)
class QuantisedLinear:
    """A layer in INT4 on the CPU, and its errors: |W - Ŵ|² / |W|², and of its outputs on the inputs that GPTQ saw,
    |X (W - Ŵ)ᵀ|² / |X Wᵀ|² (None where no inputs were looked at)."""

    weight: Int4Weight
    relative_error: float
    output_error: float | None


class Int4Weights:
    """Every block's INT4 linears and the output matrix on the CPU: a source of weights, and what a bundle writes.

    Only codes, scales and offsets are here; norms, biases and the embedding stay the full model's.
    """

    def __init__(
        self,
        weights: Mapping[tuple[int, str], Int4Weight],
        output: Int4Weight,
        group_size: int,
        relative_error: Mapping[tuple[int, str], float],
        output_error: Mapping[tuple[int, str], float] | None = None,
        rounding: Rounding = "nearest",
    ) -> None:
        self.weights = weights  # by (block, canonical name of the linear)
        self.output = output  # [vocab, hidden]
        self.group_size = group_size
        self.relative_error = relative_error  # |W - quantised W|² / |W|²
        self.output_error = (
            output_error or {}
        )  # of the layers whose inputs were looked at, see QuantisedLinear
        self.rounding = rounding

    def shared(self) -> Mapping[str, Tensor]:
        """The output matrix's tensors."""
        return int4_tensors({}, self.output)

    def block(self, index: int) -> Mapping[str, Tensor]:
        """One block's tensors, named without `blocks.<index>.`."""
        prefix = f"blocks.{index}."
        own = {key: weight for key, weight in self.weights.items() if key[0] == index}
        return {name.removeprefix(prefix): tensor for name, tensor in int4_tensors(own).items()}

    def tensors(self) -> dict[str, Tensor]:
        """All of them under their bundle names."""
        return int4_tensors(self.weights, self.output)


def check_even(group_size: int) -> None:
    """Raise OptionError where no model's linears can be held in groups of `group_size`: INT4 has two weights a byte."""
    if group_size < 2 or group_size % 2:
        raise OptionError(
            f"The INT4 group size is {group_size}; it must be even and at least 2: give 32, 64 or 128."
        )


def check_group_size(spec: Architecture, group_size: int) -> None:
    """Raise OptionError where this model's linears cannot be held in groups of `group_size`."""
    check_even(group_size)
    widest = max(fan_in for _, fan_in in linear_shapes(spec).values())
    if group_size > widest:
        raise OptionError(
            f"The INT4 group size is {group_size}, and no layer of the model has more than {widest} inputs; "
            "give at most that."
        )
    for name, (_, fan_in) in linear_shapes(spec).items():
        if fan_in % 2:
            raise OptionError(
                f"The layer {name} has {fan_in} inputs, and INT4 holds two weights a byte; calibrate with full weights."
            )


def quantize_linear(
    weight: Tensor, plan: Int4Plan, moments: Tensor | None, device: torch.device, name: str
) -> QuantisedLinear:
    """`weight` [out, in], which may lie elsewhere than on `device`, rounded there as `plan` says.

    `moments` [in, in], the inputs' second moments on `device`, are what GPTQ needs. Raises CalibrationError with
    `name`, that of the layer, for weights that INT4 cannot hold.
    """
    try:
        if plan.rounding == "nearest" or moments is None:
            packed = quantize(weight.to(device), plan.group_size)
        else:
            packed = gptq(weight, moments, plan.group_size, plan.gptq)
    except ValueError as error:
        raise CalibrationError(f"{name} cannot be held in INT4: {error}.") from error
    output_error = None if moments is None else weighted_error(weight, packed, moments)
    return QuantisedLinear(_on_cpu(packed), _relative_error(weight, packed), output_error)


def _on_cpu(packed: Int4Weight) -> Int4Weight:
    return replace(packed, codes=packed.codes.cpu(), scales=packed.scales.cpu(), offsets=packed.offsets.cpu())


def _relative_error(weight: Tensor, packed: Int4Weight) -> float:
    """|W - Ŵ|² / |W|², a slice of outputs at a time."""
    lost = wanted = 0.0
    rows = max(1, _ELEMENTS // packed.in_features)
    for start in range(0, packed.out_features, rows):
        stop = min(start + rows, packed.out_features)
        own = weight[start:stop].to(packed.codes.device, torch.float32)
        wanted += float(own.square().sum(dtype=torch.float64))
        restored = dequantize_rows(packed, start, stop, torch.float32)
        lost += float((own - restored).square_().sum(dtype=torch.float64))
    return lost / wanted if wanted > 0 else 0.0
