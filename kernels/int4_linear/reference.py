"""The INT4 linear layer in plain PyTorch: what every fast version is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.kernels.int4_linear.weight import Int4Weight, dequantize_rows

_TILE_ELEMENTS = 1 << 24  # weights dequantised at once: the full-precision copy never exceeds 64 MB


def int4_linear_reference(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """Return x [..., in] times the dequantised weight transposed, plus bias [out]: [..., out] in x's dtype.

    The product is computed in float32, a tile of outputs at a time.
    """
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"the input has {x.shape[-1]} features, the INT4 weight takes {weight.in_features}")
    inputs = x.float()
    out = torch.empty(*x.shape[:-1], weight.out_features, dtype=x.dtype, device=x.device)
    step = max(1, _TILE_ELEMENTS // weight.in_features)
    for start in range(0, weight.out_features, step):
        stop = min(start + step, weight.out_features)
        tile_bias = None if bias is None else bias[start:stop].float()
        out[..., start:stop] = F.linear(
            inputs, dequantize_rows(weight, start, stop, torch.float32), tile_bias
        )
    return out
