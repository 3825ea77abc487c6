"""A probe's second opinion, as the kernels take it: asked once a row's largest log-probabilities are known."""

import ctypes
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from exeunt.kernels.exit_gate.reference import JudgeParts

MOST_TOPS: Final = 16
"""The most log-probabilities that a judge may see (kernels/native/exit_gate.h)."""

_pointer, _long = ctypes.c_void_p, ctypes.c_int64


class JudgeStruct(ctypes.Structure):
    """`struct Judge` of kernels/native/exit_gate.h; all zeros is no judge."""

    _fields_ = (
        ("tops", _pointer),
        ("hidden_bias", _pointer),
        ("output", _pointer),
        ("output_bias", _pointer),
        ("units", _long),
        ("count", _long),
    )


@dataclass(frozen=True, slots=True)
class JudgeWeights:
    """w · GELU(u + T t + c) + b: u the probe's units, t the largest log-probabilities; float32, dense, on one device.

    Raises ValueError where the shapes do not fit each other.
    """

    parts: JudgeParts  # T [count, units], c [units], w [units], b []
    native: JudgeStruct | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        tops, hidden_bias, output, bias = self.parts
        wide = tops.dim() == 2 and hidden_bias.shape == output.shape == tops.shape[1:]
        if not wide or bias.shape != ():
            shapes = ", ".join(str(list(part.shape)) for part in self.parts)
            raise ValueError(
                f"the judge's tensors are {shapes}, expected [count, units], [units], [units] and []"
            )
        if not 2 <= tops.shape[0] <= MOST_TOPS:
            raise ValueError(f"the judge sees {tops.shape[0]} log-probabilities, it may see 2 to {MOST_TOPS}")
        object.__setattr__(self, "native", self._described())

    def __reduce__(self) -> tuple[type["JudgeWeights"], tuple[object, ...]]:
        # `native` holds addresses of these tensors: a copy is described anew
        return JudgeWeights, (self.parts,)

    @property
    def count(self) -> int:
        """How many log-probabilities it sees."""
        return int(self.parts[0].shape[0])

    @property
    def units(self) -> int:
        """How many units its probe has."""
        return int(self.parts[0].shape[1])

    def check(self, units: Tensor | None, rows: int, logits: int) -> None:
        """Raise ValueError where it cannot read units [rows, its own] and rows of `logits` logits."""
        wanted = [rows, self.units]
        if units is None or list(units.shape) != wanted:
            found = "missing" if units is None else str(list(units.shape))
            raise ValueError(f"the units are {found}, the judge takes {wanted}")
        if logits < self.count:
            raise ValueError(f"the judge sees the largest {self.count} of only {logits} logits")

    def _described(self) -> JudgeStruct | None:
        """The weights as the native library reads them, None where it does not take them."""
        if not all(
            part.is_cpu and part.is_contiguous() and part.dtype == torch.float32 for part in self.parts
        ):
            return None
        tops, hidden_bias, output, bias = self.parts
        return JudgeStruct(
            tops=tops.data_ptr(),
            hidden_bias=hidden_bias.data_ptr(),
            output=output.data_ptr(),
            output_bias=bias.data_ptr(),
            units=tops.shape[1],
            count=tops.shape[0],
        )
