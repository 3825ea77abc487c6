"""The public `paged_attention`: picks the version by device."""

from torch import Tensor

from exeunt.kernels.paged_attention.reference import paged_attention_reference
from exeunt.kernels.paged_batch import KVBlock, PagedBatch


def paged_attention(
    queries: Tensor, block: KVBlock, batch: PagedBatch, scale: float, window: int | None = None
) -> Tensor:
    """Return the attention of queries [tokens, heads, head_dim] over one block's pages, same shape and dtype.

    A token at position p attends to the keys of its row at positions max(0, p - window + 1) .. p, its own
    included, read from the pages (so `write_kv` goes first); heads share KV heads in groups of heads /
    kv_heads. Scores are multiplied by `scale`; sums are float32. Queries over INT4 pages are rotated here,
    callers pass them plain. Raises ValueError where shapes do not fit.
    """
    _check(queries, block, window)
    return paged_attention_reference(queries, block, batch, scale, window)


def _check(queries: Tensor, block: KVBlock, window: int | None) -> None:
    heads, kv_heads = queries.shape[1], block.keys.shape[1]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not share {kv_heads} KV heads evenly")
    width = block.keys.shape[3] * (2 if block.is_int4 else 1)
    if queries.shape[2] != width:
        raise ValueError(f"queries have head_dim {queries.shape[2]}, the pages hold {width}")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, it must be at least 1 token or None")
