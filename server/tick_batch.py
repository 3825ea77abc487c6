"""The tokens of a tick on their way through the stages, as tensors and by row."""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from exeunt.compression.decode_graphs import padded_layout
from exeunt.compression.graph_pool import size_for
from exeunt.compression.host_memory import integers_on_host, sent
from exeunt.kernels.paged_batch import BatchLayout, PagedBatch
from exeunt.server.row import Row


@dataclass(slots=True, eq=False)
class Part:
    """What is on its way of one row: positions, ascending."""

    row: Row
    positions: list[int]


@dataclass(slots=True, eq=False)
class TickBatch:
    """Parts and their tokens' states, [tokens, hidden], in the same order."""

    parts: list[Part]
    geometry: PagedBatch
    hidden: Tensor

    def tokens(self) -> list[tuple[Row, int]]:
        """The row and position of each token."""
        return [(part.row, position) for part in self.parts for position in part.positions]

    def spans(self) -> Iterator[tuple[Part, int, int]]:
        """Each part with the range of its tokens."""
        start = 0
        for part in self.parts:
            stop = start + len(part.positions)
            yield part, start, stop
            start = stop


def integers(values: list[int] | list[list[int]], device: torch.device) -> Tensor:
    """The values as int64 on a device, which is not waited for."""
    return sent(np.array(values, dtype=np.int64), device)


def selected(tensor: Tensor, rows: Items[int]) -> Tensor:
    """The rows [n, …] of a tensor; itself where these are all, ascending.

    `index_select` copies whole rows: indexing with a tensor takes twenty times as long for rows of logits.
    """
    if len(rows) == tensor.shape[0]:
        return tensor
    return tensor.index_select(0, integers(list(rows), tensor.device))


def geometry_of(parts: Items[Part], device: torch.device) -> PagedBatch:
    """Where the parts' tokens are and where their keys and values lie."""
    return _geometry_here(parts) if device.type == "cpu" else placed(parts, device)[0]


def placed(
    parts: Items[Part], device: torch.device, beside: Items[int] = (), context: int = 0
) -> tuple[PagedBatch, Tensor]:
    """The geometry of the parts, and the numbers `beside` as int64 on the same device.

    Elsewhere than on the host all of it is sent in one copy. A batch that fits a captured graph is padded there as the
    graph's is, for a longest context of at least `context` tokens: the graph then takes it over in one copy.
    """
    if device.type == "cpu":
        return _geometry_here(parts), integers(list(beside), device)
    positions = [p for part in parts for p in part.positions]
    tokens, context = len(positions), max(context, *(part.positions[-1] + 1 for part in parts))
    page_tokens, size = parts[0].row.sequence.table.page_tokens, size_for(len(positions))
    if size is not None:
        layout = padded_layout(size, context, page_tokens)
    else:
        layout = BatchLayout(tokens, len(parts), -(-context // page_tokens))
    host = integers_on_host(layout.numbers + len(beside), device)
    numbers = host.numpy()
    _write(layout, numbers, parts, positions)
    numbers[layout.numbers :] = beside
    there = host.to(device, non_blocking=True)
    batch = layout.batch(there[: layout.numbers], tokens, len(parts), context)
    return batch, there[layout.numbers :]


def _geometry_here(parts: Items[Part]) -> PagedBatch:
    """The parts' geometry on the host."""
    positions = [p for part in parts for p in part.positions]
    slots = [part.row.sequence.table.slot(p) for part in parts for p in part.positions]
    starts = np.fromiter(accumulate((len(part.positions) for part in parts), initial=0), dtype=np.int32)
    used = [part.positions[-1] // part.row.sequence.table.page_tokens + 1 for part in parts]
    tables = np.zeros((len(parts), max(used)), dtype=np.int32)
    for index, (part, count) in enumerate(zip(parts, used, strict=True)):
        tables[index, :count] = part.row.sequence.table.numbers[:count]
    places = torch.from_numpy(np.array([positions, slots], dtype=np.int64))
    return PagedBatch(
        positions=places[0],
        slots=places[1],
        query_starts=torch.from_numpy(starts),
        page_tables=torch.from_numpy(tables),
        max_context=max(part.positions[-1] for part in parts) + 1,
    )


def _write(layout: BatchLayout, numbers: np.ndarray, parts: Items[Part], positions: list[int]) -> None:
    """Write the parts' numbers over zeros, and behind them padding."""
    slots = [part.row.sequence.table.slot(p) for part in parts for p in part.positions]
    counts = [len(part.positions) for part in parts]
    pages = []
    for part in parts:
        table = part.row.sequence.table
        pages.append(table.numbers[: part.positions[-1] // table.page_tokens + 1])
    write_places(layout, numbers, positions, slots, counts, pages)


def write_places(
    layout: BatchLayout,
    numbers: np.ndarray,
    positions: list[int],
    slots: list[int],
    counts: list[int],
    pages: Items[np.ndarray],
) -> None:
    """Write over zeros where tokens are, how many each row has, its pages; and behind them padding.

    Padding are tokens at no position, each in its own row.
    """
    tokens, rows, wide = len(positions), len(counts), numbers[: layout.numbers].view(np.int32)
    for start, values in ((0, positions), (layout.slots, slots)):
        numbers[start : start + tokens] = values
        numbers[start + tokens : start + layout.tokens] = -1
    padding = [min(tokens + more, layout.tokens) for more in range(1, layout.rows - rows + 1)]
    wide[layout.starts : layout.starts + layout.rows + 1] = [*accumulate(counts, initial=0), *padding]
    for start, own in zip(range(layout.tables, len(wide), max(layout.pages, 1)), pages, strict=False):
        wide[start : start + len(own)] = own


def without(batch: TickBatch, gone: set[int]) -> TickBatch | None:
    """The batch without the tokens `gone`, None where nothing is left."""
    device, context = batch.hidden.device, batch.geometry.max_context
    if (
        device.type == "cpu" and batch.geometry.tokens == batch.geometry.rows
    ):  # one token a row: a decode step
        staying = [i for i in range(len(batch.parts)) if i not in gone]
        if not staying:
            return None
        index = integers(staying, device)
        rows = [batch.parts[i] for i in staying]
        return TickBatch(rows, batch.geometry.take(index), batch.hidden.index_select(0, index))
    parts: list[Part] = []
    stay: list[int] = []
    for part, start, stop in batch.spans():
        kept = [i for i in range(start, stop) if i not in gone]
        stay += kept
        if kept:
            parts.append(Part(part.row, [part.positions[i - start] for i in kept]))
    if not parts:
        return None
    geometry, index = placed(parts, device, stay, context)
    return TickBatch(parts, geometry, batch.hidden.index_select(0, index))


def of_tokens(batch: TickBatch, tokens: Items[int]) -> tuple[Tensor, PagedBatch]:
    """The states [n, hidden] of some tokens of a batch, and where they are; whose they are is not said."""
    if len(tokens) == batch.hidden.shape[0]:
        return batch.hidden, batch.geometry
    device, geometry = batch.hidden.device, batch.geometry
    if device.type == "cpu":
        index = integers(list(tokens), device)
        positions, slots = (each.index_select(0, index) for each in (geometry.positions, geometry.slots))
        return batch.hidden.index_select(0, index), replace(geometry, positions=positions, slots=slots)
    whole = batch.tokens()
    parts = [Part(row, [position]) for row, position in (whole[i] for i in tokens)]
    geometry, index = placed(parts, device, tokens, geometry.max_context)
    return batch.hidden.index_select(0, index), geometry
