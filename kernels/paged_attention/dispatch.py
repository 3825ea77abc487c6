"""The public `paged_attention`: picks the version by device."""

import torch
from torch import Tensor

from exeunt.kernels.gpu import check_one_device, triton_runs
from exeunt.kernels.native.descriptors import native_batch, native_pages
from exeunt.kernels.native.library import DTYPE_CODES, native_library
from exeunt.kernels.paged_attention.reference import paged_attention_reference
from exeunt.kernels.paged_batch import KVBlock, PagedBatch
from exeunt.kernels.write_kv.dispatch import triton_writes

_NO_WINDOW = 1 << 62


def paged_attention(
    queries: Tensor,
    block: KVBlock,
    batch: PagedBatch,
    scale: float,
    window: int | None = None,
    *,
    rotated: bool = False,
) -> Tensor:
    """Return the attention of queries [tokens, heads, head_dim] over one block's pages, same shape and dtype.

    A token at position p attends to the keys of its row at positions max(0, p - window + 1) .. p, its own
    included, read from the pages (so `write_kv` goes first); heads share KV heads in groups of heads / kv_heads.
    Scores are multiplied by `scale`; sums are float32. Queries over INT4 pages are rotated here, callers pass
    them plain unless they say `rotated`, as those of `turn_and_write_kv` are. Raises ValueError where shapes do not
    fit.
    """
    _check(queries, block, batch, window)
    if triton_runs(queries.device) and triton_writes(queries, block):
        from exeunt.kernels.paged_attention.triton import paged_attention_triton

        return paged_attention_triton(queries, block, batch, scale, window, rotated=rotated)
    turned = rotated and block.is_int4  # the native version rotates by itself
    library = native_library() if queries.is_cpu and not turned else None
    pages = None if library is None else native_pages(block)
    dtype = queries.dtype
    if library is None or pages is None or dtype not in DTYPE_CODES or pages.dtype not in (None, dtype):
        return paged_attention_reference(queries, block, batch, scale, window, rotated=rotated)
    tokens, heads, head_dim = queries.shape
    strides = queries.stride()
    if strides[2] != 1 or strides[1] != head_dim:
        queries = queries.contiguous()
    out = torch.empty((tokens, heads, head_dim), dtype=dtype)
    library.paged_attention(
        out.data_ptr(),
        queries.data_ptr(),
        pages.address,
        native_batch(batch).address,
        queries.stride(0),
        tokens,
        heads,
        _NO_WINDOW if window is None else window,
        scale,
        DTYPE_CODES[dtype],
        torch.get_num_threads(),
    )
    return out


def _check(queries: Tensor, block: KVBlock, batch: PagedBatch, window: int | None) -> None:
    check_one_device("queries, pages and the batch", queries, block.keys, batch.positions)
    tokens, heads, head_dim = queries.shape
    if tokens != batch.tokens:
        raise ValueError(f"there are {tokens} queries, the batch has {batch.tokens} tokens")
    _, kv_heads, _, width = block.keys.shape
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not share {kv_heads} KV heads evenly")
    if block.is_int4:
        width *= 2
    if head_dim != width:
        raise ValueError(f"queries have head_dim {head_dim}, the pages hold {width}")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, it must be at least 1 token or None")
