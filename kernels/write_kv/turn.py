"""The public `turn_and_write_kv`: what stands between a block's QKV product and its attention, in one call."""

from torch import Tensor

from exeunt.kernels.gpu import check_one_device, triton_runs
from exeunt.kernels.paged_batch import KVBlock
from exeunt.kernels.rows.reference import rms_norm_reference
from exeunt.kernels.write_kv.dispatch import triton_writes
from exeunt.kernels.write_kv.hadamard import rotate
from exeunt.kernels.write_kv.reference import write_kv_reference


def turn_and_write_kv(
    qkv: Tensor,
    table: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    block: KVBlock,
    heads: int,
    head_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Write the keys and values in `qkv` to their slots and return its queries [tokens, heads, head_dim].

    `qkv` [tokens, heads + 2 kv_heads, head_dim] holds queries, keys, values; `heads` may be 0. Queries and keys are
    divided by their root mean square and weighed by `head_norm` [heads + kv_heads, head_dim] where it is given, then
    turned by their position where `table` [positions, 2, head_dim] is given: cosines and signed sines (first half
    negated), all in qkv's dtype. Over INT4 pages keys are rotated and quantised as `write_kv` does, and the queries
    come back rotated too: `paged_attention(..., rotated=True)` takes them.

    `positions` and `slots` are [tokens] int64; a token with slot -1 is not written, position -1 counts as 0. Raises
    ValueError where shapes do not fit.
    """
    _check(qkv, table, positions, slots, block, heads, head_norm)
    if triton_runs(qkv.device) and triton_writes(qkv, block):
        from exeunt.kernels.write_kv.triton import turn_and_write_kv_triton

        return turn_and_write_kv_triton(qkv, table, positions, slots, block, heads, head_norm, eps)
    return turn_and_write_kv_reference(qkv, table, positions, slots, block, heads, head_norm, eps)


def turn_and_write_kv_reference(
    qkv: Tensor,
    table: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    block: KVBlock,
    heads: int,
    head_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """`turn_and_write_kv` in plain PyTorch, one operation at a time."""
    kv_heads = (qkv.shape[1] - heads) // 2
    turning, values = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    if head_norm is not None:
        turning = rms_norm_reference(turning, head_norm, eps)
    if table is not None:
        cosines, sines = table.index_select(0, positions.clamp(min=0)).unsqueeze(1).unbind(2)
        turning = turning * cosines + turning.roll(qkv.shape[2] // 2, -1) * sines
    queries, keys = turning[:, :heads], turning[:, heads:]
    written = slots >= 0
    write_kv_reference(keys[written], values[written], slots[written], block)
    return rotate(queries).to(qkv.dtype) if block.is_int4 else queries.contiguous()


def _check(
    qkv: Tensor,
    table: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    block: KVBlock,
    heads: int,
    head_norm: Tensor | None,
) -> None:
    others = [tensor for tensor in (table, head_norm) if tensor is not None]
    check_one_device(
        "qkv, positions, slots, pages, table and norm", qkv, positions, slots, block.keys, *others
    )
    tokens, all_heads, head_dim = qkv.shape
    _, kv_heads, _, width = block.keys.shape
    if block.is_int4:
        width *= 2
    if heads < 0 or (all_heads, head_dim) != (heads + 2 * kv_heads, width):
        raise ValueError(
            f"qkv is {list(qkv.shape)}, expected [tokens, {heads} + 2 × {kv_heads}, {width}] for these pages"
        )
    if positions.shape != (tokens,) or slots.shape != (tokens,):
        raise ValueError(
            f"positions are {list(positions.shape)} and slots {list(slots.shape)}, "
            f"expected one for each of {tokens} tokens"
        )
    for name, tensor, expected in (
        ("head_norm", head_norm, [heads + kv_heads, head_dim]),
        ("table", None if table is None else table[:1], [1, 2, head_dim]),
    ):
        if tensor is None:
            continue
        if list(tensor.shape) != expected or not tensor.is_contiguous() or tensor.dtype != qkv.dtype:
            raise ValueError(
                f"{name} is {list(tensor.shape)} {tensor.dtype}, expected a dense {expected} {qkv.dtype}"
            )
    if table is not None and (head_dim % 2 or not table.is_contiguous()):
        raise ValueError(f"heads of {head_dim} cannot be turned by a table {list(table.shape)}")
