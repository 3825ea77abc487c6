"""The public RMS norm: native on the CPU, plain PyTorch elsewhere. A row's result does not depend on the others."""

import torch
from torch import Tensor

from exeunt.kernels.native.library import DTYPE_CODES, native_library
from exeunt.kernels.rows.reference import rms_norm_reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x [tokens, n] / √(mean x² + eps) × weight [n], in x's dtype; rounded before the weight in 16 bits."""
    library = native_library() if x.is_cpu else None
    dtype = x.dtype
    if (
        library is None
        or dtype not in DTYPE_CODES
        or weight.dtype != dtype
        or x.dim() != 2
        or x.stride(1) != 1
    ):
        return rms_norm_reference(x, weight, eps)
    rows, size = x.shape
    if weight.shape != (size,) or not weight.is_contiguous():
        raise ValueError(f"the norm's weight is {list(weight.shape)}, expected a dense [{size}]")
    out = torch.empty((rows, size), dtype=dtype)
    library.rms_norm(
        out.data_ptr(), x.data_ptr(), weight.data_ptr(), rows, size, x.stride(0), eps, DTYPE_CODES[dtype]
    )
    return out
