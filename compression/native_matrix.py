"""A linear layer as the native kernels read it."""

import torch
from torch import Tensor

from exeunt.compression.linear import FullLinear, Int4Linear, Linear
from exeunt.kernels.int4_linear.native import PackedInt4
from exeunt.kernels.native.descriptors import Matrix


class NotNativeError(Exception):
    """A layer that the native kernels do not know."""


def native_matrix(linear: Linear, dtype: torch.dtype, held: list[Tensor]) -> Matrix:
    """The layer's description; what it points into is added to `held`, which must outlive it.

    Raises NotNativeError for a layer of another class than this project's two, or whose tensors lie elsewhere.
    """
    bias = None if linear.bias is None else native_address(linear.bias, dtype, held)
    sizes = linear.in_features, linear.out_features
    if type(linear) is FullLinear:
        return Matrix(native_address(linear.weight, dtype, held), bias, 0, *sizes)
    if type(linear) is Int4Linear and isinstance(linear.weight, PackedInt4) and not linear.skipped:
        held.append(linear.weight.panels)
        return Matrix(linear.weight.panels.data_ptr(), bias, linear.weight.group_size, *sizes)
    raise NotNativeError


def native_address(tensor: Tensor, dtype: torch.dtype, held: list[Tensor]) -> int:
    """The address of a dense CPU tensor of `dtype`, which is added to `held`; raises NotNativeError for another."""
    if tensor.dtype != dtype or not tensor.is_contiguous() or not tensor.is_cpu:
        raise NotNativeError
    held.append(tensor)
    return tensor.data_ptr()
