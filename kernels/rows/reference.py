"""RMS norm, rotary embedding and gated SiLU in plain PyTorch, in transformers' rounding order."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x [..., n] / √(mean x² + eps), rounded to x's dtype, times weight [n]."""
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight


def silu_mul_reference(x: Tensor) -> Tensor:
    """Return silu(gate) × up [..., n] of x [..., 2 n] = (gate, up)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate_heads_reference(x: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Turn x [tokens, heads, n] in place: x cos + x' sin, x' being x with the halves of a head exchanged."""
    half = x.shape[-1] // 2
    exchanged = torch.cat([x[..., half:], x[..., :half]], dim=-1)
    x.copy_(x * cosines + exchanged * sines)
