"""The public `write_kv`: picks the version by device."""

from torch import Tensor

from exeunt.kernels.paged_batch import KVBlock
from exeunt.kernels.write_kv.reference import write_kv_reference


def write_kv(keys: Tensor, values: Tensor, slots: Tensor, block: KVBlock) -> None:
    """Write keys and values [tokens, kv_heads, head_dim] to the slots [tokens] int64 of one block's pages.

    Slot = page × page_tokens + offset; each slot at most once. Full pages take the values in their dtype;
    INT4 pages take them quantised per token and head, keys rotated by `rotate` first.
    """
    write_kv_reference(keys, values, slots, block)
