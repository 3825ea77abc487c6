"""The two normalisations, in transformers' rounding order."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm (arXiv 1910.07467, no bias) or layer norm (arXiv 1607.06450) over the last dimension."""

    kind: Literal["rms", "layer"]
    weight: Tensor  # [hidden]
    bias: Tensor | None  # [hidden], layer norms only
    eps: float
    _direct: "_DirectRMSNorm | None" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        direct = self.kind == "rms" and self.weight.is_cpu and self.weight.dtype == torch.float32
        object.__setattr__(self, "_direct", _DirectRMSNorm(self.weight, self.eps) if direct else None)

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        if self._direct is not None:
            return self._direct(x)
        return rms_norm(x, self.weight, self.eps)

    def normalise(self, x: Tensor) -> Tensor:
        """The normalised state without weight and bias: what blocks with different norm weights share."""
        if self.kind == "layer":
            return F.layer_norm(x, self.weight.shape, None, None, self.eps)
        return F.rms_norm(x, self.weight.shape, None, self.eps)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)


class _DirectRMSNorm:
    """RMS norm in float32 on the CPU in four calls, half the time of F.rms_norm's ten at a few tokens.

    x / √(mean x² + ε) · w  =  x / √(|x|² + n ε) · (w √n), and hypot gives the root of the sum of two squares.
    """

    __slots__ = ("_floor", "_weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        size = weight.shape[0]
        self._weight = weight * math.sqrt(size)
        self._floor = torch.tensor(math.sqrt(size * eps), dtype=torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.div(x, length.hypot_(self._floor)).mul_(self._weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) × weight; `weight` broadcasts over x's leading dimensions, the mean is over the last one.

    In 16 bits the normalised state is rounded before the weight multiplies it, as transformers does.
    """
    if x.dtype == torch.float32 and weight.dim() == 1:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)
