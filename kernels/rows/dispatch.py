"""The public row operations: native on the CPU, plain PyTorch elsewhere.

Each is one native call without shared threads: what they do is small beside the linears around them. A row's result
does not depend on the other rows.
"""

import torch
from torch import Tensor

from exeunt.kernels.native.library import DTYPE_CODES, native_library
from exeunt.kernels.rows.reference import rms_norm_reference, rotate_heads_reference, silu_mul_reference


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


def silu_mul(x: Tensor) -> Tensor:
    """Return silu(gate) × up [tokens, n] of x [tokens, 2 n] = (gate, up), in x's dtype."""
    library = native_library() if x.is_cpu else None
    dtype = x.dtype
    if library is None or dtype not in DTYPE_CODES or x.dim() != 2 or not x.is_contiguous():
        return silu_mul_reference(x)
    rows, both = x.shape
    if both % 2:
        raise ValueError(f"gate and up are {both} values together, they must be equally many")
    out = torch.empty((rows, both // 2), dtype=dtype)
    library.silu_mul(out.data_ptr(), x.data_ptr(), rows, both // 2, DTYPE_CODES[dtype])
    return out


def rotate_heads(x: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Turn the heads of x [tokens, heads, head_dim] by their positions, in place.

    `cosines` and `sines` are [tokens, 1, head_dim], the sines of the first half negated:
    x becomes x cos + x' sin, x' being x with the halves of a head exchanged (RoFormer, arXiv 2104.09864, equation 34,
    in the order of dimensions that Llama's checkpoints use).
    """
    library = native_library() if x.is_cpu else None
    dtype = x.dtype
    tokens, heads, head_dim = x.shape
    strides, table = x.stride(), cosines.stride()
    if (
        library is None
        or dtype not in DTYPE_CODES
        or cosines.dtype != dtype
        or sines.dtype != dtype
        or cosines.shape != (tokens, 1, head_dim)
        or sines.shape != cosines.shape
        or strides[1:] != (head_dim, 1)
        or table[2] != 1
        or sines.stride() != table
    ):
        rotate_heads_reference(x, cosines, sines)
        return
    library.rotate_heads(
        x.data_ptr(),
        cosines.data_ptr(),
        sines.data_ptr(),
        tokens,
        heads,
        head_dim,
        strides[0],
        table[0],
        DTYPE_CODES[dtype],
    )
