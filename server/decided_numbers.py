"""A tick's tokens as a GPU's decided pass reads them: one array of numbers, which goes there in one copy."""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from exeunt.compression.decided_pass import PassNumbers, logit_rows
from exeunt.compression.decode_graphs import padded_layout
from exeunt.compression.graph_pool import size_for
from exeunt.compression.host_memory import integers_on_host
from exeunt.kernels.model_pass import AtExit
from exeunt.kernels.paged_batch import BatchLayout, PagedBatch
from exeunt.server.pass_parts import PassParts


@dataclass(frozen=True, slots=True)
class DecidedNumbers:
    """The numbers of a pass on their device, and which of its tokens have a row of logits."""

    batch: PagedBatch
    decided: Tensor  # [layout.count] int64
    layout: PassNumbers
    beside: Tensor  # int64, what was sent along
    with_logits: list[int]  # tokens, ascending

    @classmethod
    def of(
        cls, parts: PassParts, page_tokens: int, device: torch.device, beside: list[int]
    ) -> "DecidedNumbers | None":
        """The numbers of these parts; None where no captured graph has room for so many tokens or rows of logits."""
        tokens = parts.tokens
        with_logits = [
            i for i, pair in enumerate(zip(tokens.asks, tokens.wants_logits, strict=True)) if any(pair)
        ]
        size = size_for(len(tokens.positions))
        logits = None if size is None else logit_rows(len(with_logits), size)
        if size is None or logits is None:
            return None
        context, layout = max(tokens.positions) + 1, PassNumbers(size, logits)
        geometry = padded_layout(size, context, page_tokens)
        host = integers_on_host(geometry.numbers + layout.count + len(beside), device)
        numbers = host.numpy()
        _write_places(geometry, numbers, parts)
        _write_decisions(layout, numbers[geometry.numbers :], parts, with_logits)
        numbers[geometry.numbers + layout.count :] = beside
        there = host.to(device, non_blocking=True)
        batch = geometry.batch(there[: geometry.numbers], len(tokens.positions), len(parts.parts), context)
        end = geometry.numbers + layout.count
        return cls(batch, there[geometry.numbers : end], layout, there[end:], with_logits)


def _write_places(layout: BatchLayout, numbers: np.ndarray, parts: PassParts) -> None:
    """Write where tokens are over zeros, and behind them padding: tokens at no position, each in its own row."""
    tokens, wide = parts.tokens, numbers[: layout.numbers].view(np.int32)
    count, rows = len(tokens.positions), len(parts.parts)
    for start, values in ((0, tokens.positions), (layout.slots, tokens.slots)):
        numbers[start : start + count] = values
        numbers[start + count : start + layout.tokens] = -1
    starts = wide[layout.starts : layout.starts + layout.rows + 1]
    starts[: rows + 1] = np.fromiter(accumulate(parts.rows.tokens, initial=0), np.int32, rows + 1)
    if rows < layout.rows:
        starts[rows + 1 :] = np.minimum(np.arange(count + 1, count + 1 + layout.rows - rows), layout.tokens)
    tables = wide[layout.tables : layout.tables + layout.rows * layout.pages].reshape(layout.rows, -1)
    for index, pages in enumerate(parts.rows.pages):
        tables[index, : len(pages)] = pages


def _write_decisions(
    layout: PassNumbers, numbers: np.ndarray, parts: PassParts, with_logits: list[int]
) -> None:
    """Write what tokens do over zeros; rows of logits that are left over ask nothing."""
    tokens, rows, count = parts.tokens, parts.rows, len(with_logits)
    entries, askers = numbers[: 2 * layout.tokens].reshape(2, -1)
    entries[: len(tokens.entries)] = tokens.entries
    askers[:] = layout.logits
    of_row = np.repeat(np.arange(len(rows.tokens)), rows.tokens)
    asked = [(place, token) for place, token in enumerate(with_logits) if tokens.asks[token]]
    by_row = np.full(len(rows.tokens), layout.logits)
    by_row[of_row[[token for _, token in asked]]] = [place for place, _ in asked]
    askers[: len(of_row)] = by_row[of_row]
    wanted, asks, at_exits, thresholds = numbers[2 * layout.tokens : layout.count].reshape(4, -1)
    wanted[:count] = with_logits
    asks[:count] = [tokens.asks[token] for token in with_logits]
    kinds = np.array(rows.at_exits, dtype=np.int64)
    at_exits[:count] = kinds[of_row[with_logits]]
    asked_for = np.array([tokens.thresholds[token] for token in with_logits], dtype=np.float32)
    thresholds[:count] = asked_for.astype(np.float64).view(np.int64)


def for_good(parts: PassParts) -> bool:
    """Whether a token may leave for good."""
    return any(kind == AtExit.LEAVES for kind in parts.rows.at_exits)
