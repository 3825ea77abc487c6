"""A tick's numbers: for a graph they are padded on the host, in one piece, and say what they say without padding."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from exeunt.compression.decode_graphs import padded_layout
from exeunt.compression.host_memory import integers_on_host
from exeunt.kernels.paged_batch import BatchLayout
from exeunt.server.tick_batch import Part, TickBatch, _write, geometry_of, of_tokens, placed, without

CPU = torch.device("cpu")


class Table:
    """Pages of four tokens, out of order."""

    page_tokens = 4

    def __init__(self, first: int) -> None:
        self.pages = list(range(first + 300, first, -1))
        self.numbers = np.array(self.pages, dtype=np.int32)

    def slot(self, position: int) -> int:
        return self.pages[position // 4] * 4 + position % 4


def parts_of(*rows: list[int]) -> list[Part]:
    row: Any = None
    found = []
    for number, positions in enumerate(rows):
        row = SimpleNamespace(sequence=SimpleNamespace(table=Table(1000 * number)))
        found.append(Part(row, positions))
    return found


BATCHES = [([0],), ([5], [600], [1]), ([3, 5, 9], [2]), ([1], [2, 3, 4, 5], [7], [0])]


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("padded", [True, False])
def test_numbers_in_one_piece_are_those_of_a_geometry(rows: tuple[list[int], ...], padded: bool) -> None:
    parts, positions = parts_of(*rows), [p for row in rows for p in row]
    expected = geometry_of(parts, CPU)
    tokens, size, context = len(positions), 8, expected.max_context
    exact = BatchLayout(tokens, len(parts), -(-context // 4))
    layout = padded_layout(size, context, 4) if padded else exact
    host = integers_on_host(layout.numbers, CPU)
    _write(layout, host.numpy(), parts, positions)
    batch = layout.batch(host, tokens, len(parts), context)
    for name in ("positions", "slots", "query_starts"):
        assert torch.equal(getattr(batch, name), getattr(expected, name))
    width = expected.page_tables.shape[1]
    assert torch.equal(batch.page_tables[:, :width], expected.page_tables)
    assert not batch.page_tables[:, width:].any()
    if padded:
        whole = layout.batch(host, size, size, context)
        assert whole.positions[tokens:].tolist() == whole.slots[tokens:].tolist() == [-1] * (size - tokens)
        alone = [*range(tokens + 1, size + 1), *[size] * (tokens - len(parts))]
        assert whole.query_starts[len(parts) + 1 :].tolist() == alone


def test_numbers_beside_come_along() -> None:
    geometry, beside = placed(parts_of([4], [6]), CPU, [7, 8])
    assert geometry.positions.tolist() == [4, 6]
    assert beside.tolist() == [7, 8]
    assert beside.dtype == torch.int64


def test_some_tokens_of_a_batch() -> None:
    parts, hidden = parts_of([3, 5], [2]), torch.randn(3, 2)
    batch = TickBatch(parts, geometry_of(parts, CPU), hidden)
    states, geometry = of_tokens(batch, [0, 2])
    assert torch.equal(states, hidden[[0, 2]])
    assert geometry.positions.tolist() == [3, 2]
    assert torch.equal(geometry.slots, batch.geometry.slots[[0, 2]])
    assert of_tokens(batch, [0, 1, 2]) == (hidden, batch.geometry)
    rest = without(batch, {0})
    assert rest is not None
    assert rest.geometry.positions.tolist() == [5, 2]
    assert torch.equal(rest.hidden, hidden[1:])
    assert without(batch, {0, 1, 2}) is None
