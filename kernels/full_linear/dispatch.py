"""The public full-precision linear: native on the CPU, Triton on a GPU, PyTorch's elsewhere.

The libraries' matrix products are quick but sum in an order that depends on how many rows there are; these give a row
the same bits whatever it shares the call with. The native one is quicker, too, for the few rows of a decode step.
"""

import torch
from torch import Tensor

from exeunt.kernels.full_linear.reference import full_linear_reference
from exeunt.kernels.gpu import check_one_device, triton_runs
from exeunt.kernels.native.library import DTYPE_CODES, native_library


def full_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [..., in] times weight [out, in] transposed, plus bias [out]: [..., out] in x's dtype.

    All three are of one dtype. Sums are float32, rounded once. Where gradients are wanted PyTorch's own runs. Raises
    ValueError where the sizes do not fit.
    """
    dtype = x.dtype
    library = native_library() if x.is_cpu else None
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return full_linear_reference(x, weight, bias)
    if triton_runs(x.device) and dtype in DTYPE_CODES and all(tensor.dtype == dtype for tensor in tensors):
        check_one_device("the input, the weight and the bias", *tensors)
        # Triton is there only where a GPU is
        from exeunt.kernels.full_linear.triton import full_linear_triton

        return full_linear_triton(x, weight, bias).view(*x.shape[:-1], weight.shape[0])
    if library is None or dtype not in DTYPE_CODES or weight.dtype != dtype or not weight.is_contiguous():
        return full_linear_reference(x, weight, bias)
    *leading, features = x.shape
    outputs, inputs = weight.shape
    if features != inputs or (bias is not None and bias.shape != (outputs,)):
        raise ValueError(
            f"the input has {features} features, the weight is {list(weight.shape)}"
            + ("" if bias is None else f" and the bias {list(bias.shape)}")
        )
    x = x.contiguous()
    if bias is not None and (bias.dtype != dtype or not bias.is_contiguous()):
        bias = bias.to(dtype).contiguous()
    out = torch.empty((*leading, outputs), dtype=dtype)
    library.full_linear(
        out.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.numel() // features,
        features,
        outputs,
        DTYPE_CODES[dtype],
        torch.get_num_threads(),
    )
    return out
