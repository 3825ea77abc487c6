"""Attention over paged keys and values in plain PyTorch: what every fast version is tested against."""

import torch
from torch import Tensor

from exeunt.kernels.paged_batch import KVBlock, PagedBatch
from exeunt.kernels.write_kv.hadamard import rotate
from exeunt.kernels.write_kv.reference import dequantize_heads

_SCRATCH_ELEMENTS = 1 << 24  # gathered keys, and scores, held at once: 64 MB each in float32
_QUERY_CHUNK = 128  # queries of a row attended at once


def paged_attention_reference(
    queries: Tensor,
    block: KVBlock,
    batch: PagedBatch,
    scale: float,
    window: int | None,
    *,
    rotated: bool = False,
) -> Tensor:
    """Return [tokens, heads, head_dim] in the queries' dtype; see `exeunt.kernels.paged_attention`.

    Rows are padded to a common length and masked by position. The first token of every row is one chunk and
    the rest follow in chunks, so that decode rows are not padded to the length of a prefill row beside
    them.
    """
    out = torch.empty_like(queries)
    if queries.shape[0] == 0:
        return out
    inputs = rotate(queries) if block.is_int4 and not rotated else queries.float()
    starts = batch.query_starts.long()
    counts = starts.diff()
    row_elements = batch.max_context * block.keys.shape[1] * queries.shape[2]
    longest = int(counts.max())
    first, chunk = 0, 1
    while first < longest:
        rows_left = torch.nonzero(counts > first).flatten()
        scores_row = chunk * queries.shape[1] * batch.max_context
        together = max(1, _SCRATCH_ELEMENTS // max(row_elements, scores_row))
        for start in range(0, len(rows_left), together):
            rows = rows_left[start : start + together]
            steps = torch.arange(first, first + chunk, device=queries.device)
            tokens = starts[rows, None] + steps  # [rows, chunk]
            present = steps < counts[rows, None]
            tokens = torch.where(present, tokens, starts[rows, None])
            attended = _attend(inputs, tokens, batch, block, rows, scale, window)
            out[tokens[present]] = attended[present].to(out.dtype)
        first += chunk
        chunk = min(_QUERY_CHUNK, longest - first)
    return out


def _attend(
    inputs: Tensor,
    tokens: Tensor,
    batch: PagedBatch,
    block: KVBlock,
    rows: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """Return [rows, chunk, heads, head_dim] float32 for the `tokens` [rows, chunk] of the given rows."""
    positions = batch.positions[tokens]  # [rows, chunk]
    context = int(positions.max()) + 1
    places = torch.arange(context, device=inputs.device)
    seen = places <= positions[..., None]  # [rows, chunk, context]
    if window is not None:
        seen &= places > positions[..., None] - window
    tables = batch.page_tables[rows, : -(-context // block.page_tokens)].long()
    within = (
        torch.arange(tables.shape[1], device=inputs.device) * block.page_tokens <= positions.amax(1)[:, None]
    )
    tables = torch.where(
        within, tables, torch.zeros_like(tables)
    )  # entries past the row's end may be anything
    keys, values = gather_kv(block, tables, context)  # [rows, kv_heads, context, head_dim]
    # What a query does not see may be unwritten memory or a later token's overflow, and 0 × NaN is NaN: what is not
    # finite is left out of the sum, and told to those that do see it.
    finite = values.isfinite().all(-1)  # [rows, kv_heads, context]
    values = values.masked_fill(~finite[..., None], 0.0)
    broken = (seen[:, :, None] & ~finite[:, None]).any(-1)  # [rows, chunk, kv_heads]
    row_count, kv_heads = keys.shape[:2]
    heads, head_dim = inputs.shape[1:]
    grouped = inputs[tokens].reshape(row_count, -1, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("rqhgd,rhkd->rhgqk", grouped, keys) * scale
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    mixed = torch.einsum("rhgqk,rhkd->rqhgd", scores.softmax(-1), values)
    mixed = mixed.masked_fill(broken[..., None, None], float("nan"))
    return mixed.reshape(row_count, -1, heads, head_dim)


def gather_kv(block: KVBlock, tables: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Return the first `context` keys and values of each row of `tables` [rows, pages], as float32.

    Both are [rows, kv_heads, context, head_dim]; INT4 keys come out rotated, as they are stored.
    """

    def rows_of(pages: Tensor) -> Tensor:
        gathered = pages[tables]  # [rows, pages, kv_heads, page_tokens, n]
        return gathered.transpose(1, 2).flatten(2, 3)[:, :, :context]

    if block.key_params is None or block.value_params is None:
        return rows_of(block.keys).float(), rows_of(block.values).float()
    return (
        dequantize_heads(rows_of(block.keys), rows_of(block.key_params)),
        dequantize_heads(rows_of(block.values), rows_of(block.value_params)),
    )
