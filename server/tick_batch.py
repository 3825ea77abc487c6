"""The tokens of a tick on their way through the stages, as tensors and by row."""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from exeunt.kernels.paged_batch import PagedBatch
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
    """The values as int64 on a device."""
    return torch.from_numpy(np.array(values, dtype=np.int64)).to(device)


def selected(tensor: Tensor, rows: Items[int]) -> Tensor:
    """The rows [n, …] of a tensor; itself where these are all, ascending.

    `index_select` copies whole rows: indexing with a tensor takes twenty times as long for rows of logits.
    """
    if len(rows) == tensor.shape[0]:
        return tensor
    return tensor.index_select(0, integers(list(rows), tensor.device))


def geometry_of(parts: Items[Part], device: torch.device) -> PagedBatch:
    """Where the parts' tokens are and where their keys and values lie."""
    positions = [p for part in parts for p in part.positions]
    slots = [part.row.sequence.table.slot(p) for part in parts for p in part.positions]
    starts = np.fromiter(accumulate((len(part.positions) for part in parts), initial=0), dtype=np.int32)
    used = [part.positions[-1] // part.row.sequence.table.page_tokens + 1 for part in parts]
    tables = np.zeros((len(parts), max(used)), dtype=np.int32)
    for index, (part, count) in enumerate(zip(parts, used, strict=True)):
        tables[index, :count] = part.row.sequence.table.pages[:count]
    places = integers([positions, slots], device)
    return PagedBatch(
        positions=places[0],
        slots=places[1],
        query_starts=torch.from_numpy(starts).to(device),
        page_tables=torch.from_numpy(tables).to(device),
        max_context=max(part.positions[-1] for part in parts) + 1,
    )


def without(batch: TickBatch, gone: set[int]) -> TickBatch | None:
    """The batch without the tokens `gone`, None where nothing is left."""
    device = batch.hidden.device
    if batch.geometry.tokens == batch.geometry.rows:  # one token a row: a decode step
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
    return TickBatch(parts, geometry_of(parts, device), selected(batch.hidden, stay))
