"""The public norms: native on the CPU (the RMS norm), Triton on a GPU, plain PyTorch elsewhere.

A row's result does not depend on the others. Where gradients are wanted PyTorch's own runs on a GPU.
"""

import torch
from torch import Tensor

from exeunt.kernels.gpu import check_one_device, triton_runs
from exeunt.kernels.native.library import DTYPE_CODES, native_library
from exeunt.kernels.rows.reference import layer_norm_reference, rms_norm_reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x [tokens, n] / √(mean x² + eps) × weight [n], in x's dtype; rounded before the weight in 16 bits.

    A weight [heads, n] holds one for each head of x [tokens, heads, n].
    """
    if _on_gpu(x, weight):
        from exeunt.kernels.rows.triton import rms_norm_triton  # Triton is there only where a GPU is

        return rms_norm_triton(x, weight, eps)
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


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return (x - mean) / √(variance + eps) of rows x [..., n], × weight [n] + bias [n] where given, in x's dtype."""
    if _on_gpu(x, *(part for part in (weight, bias) if part is not None)):
        from exeunt.kernels.rows.triton import layer_norm_triton

        return layer_norm_triton(x, weight, bias, eps)
    return layer_norm_reference(x, weight, bias, eps)


def _on_gpu(*tensors: Tensor) -> bool:
    """Whether the Triton kernels take these tensors: of one dtype that they know, with no gradient wanted."""
    dtype = tensors[0].dtype
    if not triton_runs(tensors[0].device) or dtype not in DTYPE_CODES:
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    check_one_device("rows and their norm's weights", *tensors)
    return all(tensor.dtype == dtype for tensor in tensors)
