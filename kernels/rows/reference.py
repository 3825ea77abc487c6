"""RMS norm in plain PyTorch, in transformers' rounding order."""

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x [..., n] / √(mean x² + eps), rounded to x's dtype, times weight [n]."""
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight
