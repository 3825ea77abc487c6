"""What the native kernels need to know of matrices, pages and batches, gathered once for each and kept with it."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from exeunt.kernels.native.library import DTYPE_CODES
from exeunt.kernels.paged_batch import KVBlock, PagedBatch

_pointer, _long = ctypes.c_void_p, ctypes.c_int64


class Matrix(ctypes.Structure):
    """`struct Matrix` of kernels/native/blocks.h; a `group_size` of 0 is full precision."""

    _fields_ = (
        ("weight", _pointer),
        ("bias", _pointer),
        ("group_size", _long),
        ("inputs", _long),
        ("outputs", _long),
    )


@dataclass(frozen=True, slots=True)
class NativePages:
    """A `KVBlock` as `struct Pages` of kernels/native/pages.h; `dtype` is None for INT4 pages."""

    struct: ctypes.Array[ctypes.c_int64]
    address: int
    dtype: torch.dtype | None
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class NativeBatch:
    """A `PagedBatch` as `struct Batch` of kernels/native/pages.h."""

    struct: ctypes.Array[ctypes.c_int64]
    address: int


def native_pages(block: KVBlock) -> NativePages | None:
    """Return the block's description, or None where the native kernels do not take its dtype or strides."""
    if block.native is None:
        object.__setattr__(block, "native", _describe_pages(block) or False)
    return block.native if isinstance(block.native, NativePages) else None


def native_batch(batch: PagedBatch) -> NativeBatch:
    """Return the batch's description; raises TypeError or ValueError where a tensor is not what `PagedBatch` says."""
    if not isinstance(batch.native, NativeBatch):
        object.__setattr__(batch, "native", _describe_batch(batch))
    return batch.native  # type: ignore[return-value]


def _describe_pages(block: KVBlock) -> NativePages | None:
    if block.key_params is None or block.value_params is None:
        if block.keys.dtype not in DTYPE_CODES or block.values.dtype != block.keys.dtype:
            return None
        tensors, head_dim = [block.keys, block.values], block.keys.shape[3]
    else:
        tensors = [block.keys, block.values, block.key_params, block.value_params]
        head_dim = block.keys.shape[3] * 2
    if any(tensor.stride(3) != 1 or not tensor.is_cpu for tensor in tensors):
        return None
    words = [word for tensor in tensors for word in _describe(tensor)] + [0] * (16 - 4 * len(tensors))
    struct = (ctypes.c_int64 * 19)(*words, block.page_tokens, block.keys.shape[1], head_dim)
    dtype = None if block.is_int4 else block.keys.dtype
    return NativePages(struct, ctypes.addressof(struct), dtype, block.keys.shape[1], head_dim)


def _describe(tensor: Tensor) -> list[int]:
    return [tensor.data_ptr(), *(stride * tensor.element_size() for stride in tensor.stride()[:3])]


def _describe_batch(batch: PagedBatch) -> NativeBatch:
    for name, tensor, dtype in (
        ("positions", batch.positions, torch.int64),
        ("query_starts", batch.query_starts, torch.int32),
        ("page_tables", batch.page_tables, torch.int32),
    ):
        if tensor.dtype != dtype or (tensor.numel() > 1 and tensor.stride(-1) != 1) or not tensor.is_cpu:
            raise TypeError(
                f"{name} are {tensor.dtype} with strides {tensor.stride()} on {tensor.device}, expected dense {dtype} "
                "on the CPU"
            )
    if batch.query_starts.shape != (batch.rows + 1,):
        raise ValueError(
            f"query_starts are {list(batch.query_starts.shape)}, expected one more than the {batch.rows} rows"
        )
    struct = (ctypes.c_int64 * 6)(
        batch.positions.data_ptr(),
        batch.query_starts.data_ptr(),
        batch.page_tables.data_ptr(),
        batch.rows,
        batch.page_tables.stride(0),
        batch.max_context,
    )
    return NativeBatch(struct, ctypes.addressof(struct))
