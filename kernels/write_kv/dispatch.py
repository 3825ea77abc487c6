"""The public `write_kv`: picks the version by device."""

import torch
from torch import Tensor

from exeunt.kernels.gpu import check_one_device, triton_runs
from exeunt.kernels.native.descriptors import native_pages
from exeunt.kernels.native.library import DTYPE_CODES, native_library
from exeunt.kernels.paged_batch import KVBlock
from exeunt.kernels.write_kv.reference import write_kv_reference


def write_kv(keys: Tensor, values: Tensor, slots: Tensor, block: KVBlock) -> None:
    """Write keys and values [tokens, kv_heads, head_dim] to the slots [tokens] int64 of one block's pages.

    Slot = page × page_tokens + offset; each slot at most once. Full pages take the values in their dtype; INT4
    pages take them quantised per token and head, keys rotated by `rotate` first. The native version, the Triton one
    and the PyTorch one write the same bits. On a GPU a token with slot -1 is not written. Raises ValueError where
    shapes do not fit; that the slots lie inside the pages is not looked at, the page tables that made them answer
    for it.
    """
    _check(keys, values, slots, block)
    if triton_runs(keys.device) and values.dtype == keys.dtype and triton_writes(keys, block):
        from exeunt.kernels.write_kv.triton import write_kv_triton

        write_kv_triton(keys, values, slots, block)
        return
    library = native_library() if keys.is_cpu else None
    pages = None if library is None else native_pages(block)
    dtype = keys.dtype
    if (
        library is None
        or pages is None
        or dtype not in DTYPE_CODES
        or values.dtype != dtype
        or not (values.is_cpu and slots.is_cpu)
        or pages.dtype not in (None, dtype)
    ):
        write_kv_reference(keys, values, slots, block)
        return
    keys, values = dense_heads(keys), dense_heads(values)
    if slots.dtype != torch.int64 or not slots.is_contiguous():
        slots = slots.to(torch.int64).contiguous()
    library.write_kv(
        pages.address,
        keys.data_ptr(),
        values.data_ptr(),
        keys.stride(0),
        values.stride(0),
        slots.data_ptr(),
        slots.shape[0],
        DTYPE_CODES[dtype],
        torch.get_num_threads(),
    )


def triton_writes(x: Tensor, block: KVBlock) -> bool:
    """Whether the Triton kernels take tensors of x's dtype for these pages."""
    if x.dtype not in DTYPE_CODES or block.keys.stride(3) != 1 or block.values.stride(3) != 1:
        return False
    if block.key_params is None or block.value_params is None:
        return block.keys.dtype == block.values.dtype == x.dtype
    return block.key_params.stride(3) == block.value_params.stride(3) == 1


def _check(keys: Tensor, values: Tensor, slots: Tensor, block: KVBlock) -> None:
    check_one_device("keys, values, slots and the pages", keys, values, slots, block.keys)
    tokens, (_, kv_heads, _, width) = keys.shape[0], block.keys.shape
    expected = (tokens, kv_heads, width * 2 if block.is_int4 else width)
    if keys.shape != expected or values.shape != expected:
        raise ValueError(
            f"keys are {list(keys.shape)} and values {list(values.shape)}, the pages take {list(expected)}"
        )
    if slots.shape != (tokens,):
        raise ValueError(f"slots are {list(slots.shape)}, expected one for each of {tokens} tokens")


def dense_heads(x: Tensor) -> Tensor:
    """Return x [tokens, heads, head_dim], copied unless each token's heads lie together."""
    strides = x.stride()
    return x if strides[2] == 1 and strides[1] == x.shape[2] else x.contiguous()
