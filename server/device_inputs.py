"""A tick's tokens as a device's pass reads them: one array of numbers, which goes there in one copy."""

from array import array
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exeunt.compression.decode_graphs import padded_layout
from exeunt.compression.device_pass import PassLayout, logit_rows
from exeunt.compression.graph_pool import size_for
from exeunt.compression.host_memory import integers_on_host
from exeunt.kernels.paged_batch import PagedBatch
from exeunt.server.pass_parts import PassParts
from exeunt.server.tick_batch import write_places


@dataclass(frozen=True, slots=True)
class DeviceInputs:
    """The numbers of a pass on their device, and which of its tokens have a row of logits."""

    batch: PagedBatch
    layout: PassLayout
    numbers: Tensor  # [layout.count] int64
    beside: Tensor  # int64, what was sent along
    with_logits: list[int]  # tokens, ascending

    @classmethod
    def of(
        cls, parts: PassParts, page_tokens: int, device: torch.device, beside: list[int]
    ) -> "DeviceInputs | None":
        """The numbers of these parts; None where no captured graph has room for so many tokens or rows of logits."""
        tokens, rows = parts.tokens, parts.rows
        count = len(tokens.positions)
        with_logits = [i for i in range(count) if tokens.asks[i] or tokens.wants_logits[i]]
        size = size_for(count)
        logits = None if size is None else logit_rows(len(with_logits), size)
        if size is None or logits is None:
            return None
        context, layout = max(tokens.positions) + 1, PassLayout(size, logits)
        places = padded_layout(size, context, page_tokens)
        end = places.numbers + layout.count
        host = integers_on_host(end + len(beside), device)
        numbers = host.numpy()
        write_places(places, numbers, tokens.positions, tokens.slots, rows.tokens, rows.pages)
        _write_asks(layout, numbers[places.numbers : end], parts, with_logits)
        numbers[end:] = beside
        there = host.to(device, non_blocking=True)
        batch = places.batch(there[: places.numbers], count, len(rows.tokens), context)
        return cls(batch, layout, there[places.numbers : end], there[end:], with_logits)


def _write_asks(layout: PassLayout, numbers: np.ndarray, parts: PassParts, with_logits: list[int]) -> None:
    """Write what tokens do over zeros; rows of logits that are left over ask nothing."""
    tokens, rows, nobody = parts.tokens, parts.rows, layout.logits
    row_of = [row for row, count in enumerate(rows.tokens) for _ in range(count)]
    gate_row = {row_of[token]: place for place, token in enumerate(with_logits) if tokens.asks[token]}
    gate_rows = [gate_row.get(row, nobody) for row in row_of] + [nobody] * (layout.tokens - len(row_of))
    asks = [tokens.asks[token] for token in with_logits]
    at_exits = [int(rows.at_exits[row_of[token]]) for token in with_logits]
    # rounded to float32, as gates compare them; in 64 bits, so that one copy takes all
    rounded = array("f", [tokens.thresholds[token] for token in with_logits])
    thresholds = np.frombuffer(array("d", rounded), np.int64)
    numbers[: len(row_of)] = tokens.entries
    numbers[layout.tokens : 2 * layout.tokens] = gate_rows
    start = 2 * layout.tokens
    for values in (with_logits, asks, at_exits, thresholds):
        numbers[start : start + len(values)] = values
        start += layout.logits
