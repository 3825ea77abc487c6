"""One transformer block on a GPU: what `exeunt.compression.block` does one operation at a time, in few launches.

Norm and QKV product; head norms, RoPE, rotation, quantisation and the writing of keys and values; attention; output
product and residual; norm, gate and up products and activation; down product and residual. Each is row-invariant, so
that a token's state is the same to the bit whatever shares the call (`exeunt.kernels`).
"""

import torch
from torch import Tensor

from exeunt.compression.block import Block
from exeunt.compression.linear import FullLinear, Int4Linear
from exeunt.compression.norm import Norm
from exeunt.kernels.gpu import triton_runs
from exeunt.kernels.paged_attention import paged_attention
from exeunt.kernels.paged_batch import KVBlock, PagedBatch
from exeunt.kernels.rows.norm import RowNorm
from exeunt.kernels.write_kv import turn_and_write_kv


def runs_fused(block: Block, device: torch.device) -> bool:
    """Whether `run_fused` takes the block: on a GPU with Triton, its linears of the project's two classes."""
    return triton_runs(device) and all(
        type(linear) in (FullLinear, Int4Linear) for linear in block.linears().values()
    )


def run_fused(block: Block, hidden: Tensor, table: Tensor | None, batch: PagedBatch, kv: KVBlock) -> Tensor:
    """`Block.run`: the block applied to `hidden` [tokens, hidden] in place.

    `table` [positions, 2, head_dim] holds cosines and signed sines (`RopeTables.table`), None for learned positions.
    """
    spec, tokens = block.spec, hidden.shape[0]
    positions = batch.masked_positions
    qkv = block.qkv.fused(hidden, norm=_row_norm(block.attention_norm), positions=positions)
    queries = turn_and_write_kv(
        qkv.view(tokens, spec.heads + 2 * spec.kv_heads, spec.head_dim),
        table,
        batch.positions,
        batch.slots,
        kv,
        spec.heads,
        block.head_norm,
        spec.norm_eps,
    )
    attended = paged_attention(queries, kv, batch, block.scale, block.window, rotated=kv.is_int4)
    block.out.fused(attended.view(tokens, spec.query_size), residual=hidden, positions=positions)
    inner = block.up.fused(
        hidden,
        norm=_row_norm(block.mlp_norm),
        activation=spec.activation,
        gated=spec.gated,
        positions=positions,
    )
    return block.down.fused(inner, residual=hidden, positions=positions)


def project_fused(block: Block, hidden: Tensor, table: Tensor | None, batch: PagedBatch, kv: KVBlock) -> None:
    """`Block.project_kv` in a product and one kernel that turns, rotates and writes; arguments as `run_fused`'s.

    What is written are the bits that the block itself would write of `hidden`, in any company.
    """
    spec = block.spec
    rows = block.kv_rows.fused(hidden, norm=_row_norm(block.attention_norm), positions=batch.masked_positions)
    turn_and_write_kv(
        rows.view(hidden.shape[0], 2 * spec.kv_heads, spec.head_dim),
        table,
        batch.positions,
        batch.slots,
        kv,
        0,
        None if block.head_norm is None else block.head_norm[spec.heads :],
        spec.norm_eps,
    )


def _row_norm(norm: Norm) -> RowNorm:
    return RowNorm(norm.kind, norm.weight, norm.bias, norm.eps)
