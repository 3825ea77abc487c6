"""The norms in plain PyTorch, in transformers' rounding order."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x [..., n] / √(mean x² + eps), rounded to x's dtype, times weight [n]."""
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return the layer norm of rows x [..., n], times weight [n] plus bias [n] where there are, rounded once."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
