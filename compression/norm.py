"""The two normalisations, in transformers' rounding order."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.kernels.rows import rms_norm as row_rms_norm


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm (arXiv 1910.07467, no bias) or layer norm (arXiv 1607.06450) over the last dimension."""

    kind: Literal["rms", "layer"]
    weight: Tensor  # [hidden]
    bias: Tensor | None  # [hidden], layer norms only
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return row_rms_norm(x, self.weight, self.eps)

    def normalise(self, x: Tensor) -> Tensor:
        """The normalised state without weight and bias: what blocks with different norm weights share."""
        if self.kind == "layer":
            return F.layer_norm(x, self.weight.shape, None, None, self.eps)
        return F.rms_norm(x, self.weight.shape, None, self.eps)

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) × weight; `weight` broadcasts over x's leading dimensions, the mean is over the last one.

    In 16 bits the normalised state is rounded before the weight multiplies it, as transformers does.
    """
    if x.dtype == torch.float32 and weight.dim() == 1:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)
