"""A tick's tokens as a GPU's decided pass reads them: one array of numbers, which goes there in one copy."""

from array import array
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
    padding = [min(count + more, layout.tokens) for more in range(1, layout.rows - rows + 1)]
    starts = [*accumulate(parts.rows.tokens, initial=0), *padding]
    wide[layout.starts : layout.starts + layout.rows + 1] = starts
    for start, pages in zip(range(layout.tables, len(wide), layout.pages), parts.rows.pages, strict=False):
        wide[start : start + len(pages)] = pages


def _write_decisions(
    layout: PassNumbers, numbers: np.ndarray, parts: PassParts, with_logits: list[int]
) -> None:
    """Write what tokens do over zeros; rows of logits that are left over ask nothing."""
    tokens, rows = parts.tokens, parts.rows
    row_of = [row for row, count in enumerate(rows.tokens) for _ in range(count)]
    asker_of = {row_of[token]: place for place, token in enumerate(with_logits) if tokens.asks[token]}
    nobody = layout.logits
    askers = [asker_of.get(row, nobody) for row in row_of] + [nobody] * (layout.tokens - len(row_of))
    asks = [tokens.asks[token] for token in with_logits]
    at_exits = [int(rows.at_exits[row_of[token]]) for token in with_logits]
    rounded = array("f", [tokens.thresholds[token] for token in with_logits])
    thresholds = np.frombuffer(array("d", rounded), np.int64)
    numbers[: len(row_of)] = tokens.entries
    numbers[layout.tokens : 2 * layout.tokens] = askers
    start = 2 * layout.tokens
    for values in (with_logits, asks, at_exits, thresholds):
        numbers[start : start + len(values)] = values
        start += layout.logits


def for_good(parts: PassParts) -> bool:
    """Whether a token may leave for good."""
    return any(kind == AtExit.LEAVES for kind in parts.rows.at_exits)
