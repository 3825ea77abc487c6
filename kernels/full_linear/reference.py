"""The full-precision linear layer in plain PyTorch: what the native version is tested against."""

import torch.nn.functional as F
from torch import Tensor


def full_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [..., in] times weight [out, in] transposed, plus bias [out]: [..., out] in x's dtype."""
    return F.linear(x, weight, bias)
