"""Passes over blocks as graphs: what they read is filled and padded, when they are captured, what they take."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from exeunt.compression.decode_graphs import MOST_GRAPHS, TOKENS, DecodeGraphs, Inputs
from exeunt.compression.device_pass import PassExit, PassInputs, PassLayout, PassResults
from exeunt.compression.gate_steps import GateSteps
from exeunt.compression.graph_pool import ASKED_AGAIN
from exeunt.compression.kv_format import KVPages
from exeunt.kernels.paged_batch import BatchLayout, PagedBatch
from tests.compression.fake_graphs import GROWN, TOTAL, FakePool
from tests.compression.paged_generation import padded

HIDDEN, PAGE_TOKENS = 6, 16


class Blocks:
    """Stands for blocks: a state grows by its position, and what is projected is kept."""

    def __init__(self) -> None:
        self.projected: list[tuple[Tensor, Tensor]] = []

    def run(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> Tensor:
        return hidden.add_(batch.positions[:, None] * (stop - start))

    def project_kv(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> None:
        self.projected.append((hidden.clone(), batch.slots.clone()))


def pages() -> Any:
    class Pages:
        layout = type("Layout", (), {"page_tokens": PAGE_TOKENS})

    return Pages()


def batch_of(counts: list[int], context: int = 0) -> PagedBatch:
    """Rows of so many tokens each, at places that tell them apart."""
    tokens = sum(counts)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    tables = torch.arange(len(counts) * 2, dtype=torch.int32).view(len(counts), 2) + 1
    return PagedBatch(
        torch.arange(tokens) + 3, torch.arange(tokens) + 50, starts, tables, max(tokens + 3, context)
    )


def packed(batch: PagedBatch, size: int) -> PagedBatch:
    """The same in a graph's layout."""
    return padded(batch, PAGE_TOKENS, size)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 7), (2, 2, 32), (129, 6, 1)])
def test_parts_lie_apart_and_where_vectors_can_be_read(sizes: tuple[int, int, int]) -> None:
    layout = BatchLayout(*sizes)
    numbers = torch.zeros(layout.numbers, dtype=torch.int64)
    batch = layout.batch(numbers, *sizes[:2], 9)
    parts = [batch.positions, batch.slots, batch.query_starts, batch.page_tables]
    assert [tuple(part.shape) for part in parts] == [
        (sizes[0],),
        (sizes[0],),
        (sizes[1] + 1,),
        (sizes[1], sizes[2]),
    ]
    for number, part in enumerate(parts):
        assert (part.data_ptr() - numbers.data_ptr()) % 16 == 0
        part.fill_(number + 1)
    for number, part in enumerate(parts):
        assert (part == number + 1).all()
    assert batch.packed is not None
    assert batch.packed.numbers is numbers


@pytest.mark.parametrize(("counts", "size"), [([1], 1), ([1, 1, 1], 4), ([3, 1, 2], 8), ([5], 8)])
def test_a_batch_padded_where_it_was_made_is_taken_over_as_it_is(counts: list[int], size: int) -> None:
    hidden, batch = torch.randn(sum(counts), HIDDEN), batch_of(counts)
    plain, copied = (Inputs.empty(size, 512, PAGE_TOKENS, hidden) for _ in range(2))
    plain.fill(hidden, batch)
    copied.fill(hidden, packed(batch, size))
    for name in ("positions", "slots", "query_starts", "page_tables"):
        assert torch.equal(getattr(plain.batch, name), getattr(copied.batch, name))
    assert torch.equal(plain.hidden, copied.hidden)
    tokens, starts = sum(counts), plain.batch.query_starts.tolist()
    assert starts[: len(counts) + 1] == batch.query_starts.tolist()
    assert starts[-1] == size
    assert plain.batch.positions[tokens:].tolist() == [-1] * (size - tokens)
    plain.fill(hidden[:1], batch_of([1]))
    copied.fill(hidden[:1], batch_of([1]))
    assert torch.equal(plain.batch.query_starts, copied.batch.query_starts)


def test_passes_are_those_of_the_blocks() -> None:
    pool, blocks, arena = FakePool(), Blocks(), pages()
    graphs = DecodeGraphs(blocks, 600, pool)
    for counts in ([1, 1, 1], [3, 1], [1], [2, 1]):
        for batch in (batch_of(counts), packed(batch_of(counts), 4)):
            hidden = torch.randn(sum(counts), HIDDEN)
            given = hidden.clone()
            found = graphs.run(hidden, batch, arena, 1, 3)
            assert found is not None
            assert torch.equal(found, given + 2 * batch.positions[:, None])
            assert torch.equal(hidden, given)
    assert graphs.count == pool.count == 2
    inputs = sum(Inputs.empty(n, 512, PAGE_TOKENS, torch.zeros(1, HIDDEN)).nbytes for n in (1, 4))
    assert pool.nbytes == 2 * GROWN + inputs


def test_a_longer_context_has_a_graph_of_its_own_up_to_the_longest() -> None:
    class Seeing(Blocks):
        """Remembers for what context a batch has room."""

        def run(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> Tensor:
            self.room = batch.max_context, batch.page_tables.shape[1] * PAGE_TOKENS
            return super().run(hidden, batch, pages, start, stop)

    blocks, arena = Seeing(), pages()
    graphs = DecodeGraphs(blocks, 1024, FakePool())
    layout = PassLayout(1, 1)
    asked = PassInputs(layout, torch.zeros(layout.count, dtype=torch.int64), (), propagates=False, last=0)
    for context, room in ((512, 512), (513, 1024), (1024, 1024), (500, 512)):
        batch, hidden = batch_of([1], context), torch.zeros(1, HIDDEN)
        assert graphs.run(hidden, batch, arena, 0, 1) is not None
        assert blocks.room == (room, room)
        blocks.room = 0, 0
        assert graphs.run_pass(asked, lambda states: states, 1, hidden, packed(batch, 1), arena) is not None
        assert blocks.room == (room, room)
    batch = batch_of([1], 1025)
    assert graphs.run(hidden, batch, arena, 0, 1) is None
    assert graphs.run_pass(asked, lambda states: states, 1, hidden, packed(batch, 1), arena) is None
    assert graphs.count == 4


def test_what_fits_no_graph_runs_without() -> None:
    pool = FakePool()
    graphs = DecodeGraphs(Blocks(), 600, pool)
    long = batch_of([1])
    too_long = PagedBatch(long.positions, long.slots, long.query_starts, long.page_tables, 1025)
    assert graphs.run(torch.zeros(1, HIDDEN), too_long, pages(), 0, 1) is None
    many = TOKENS[-1] + 1
    assert graphs.run(torch.zeros(many, HIDDEN), batch_of([1] * many), pages(), 0, 1) is None
    assert graphs.run(torch.zeros(0, HIDDEN), batch_of([0]), pages(), 0, 1) is None
    assert not graphs.project_kv(torch.zeros(many, HIDDEN), batch_of([1] * many), pages(), 0, 1)
    assert pool.captures == 0
    pool.failing = True
    arena = pages()
    for _ in range(2):
        assert graphs.run(torch.zeros(1, HIDDEN), batch_of([1]), arena, 0, 1) is None
        assert not graphs.project_kv(torch.zeros(1, HIDDEN), batch_of([1]), arena, 0, 1)
    assert pool.captures == 2
    assert graphs.count == 0


def test_a_decoders_graphs_have_a_bound() -> None:
    pool, arena = FakePool(), pages()
    graphs = DecodeGraphs(Blocks(), 600, pool)
    for start in range(MOST_GRAPHS + 5):
        found = graphs.run(torch.zeros(1, HIDDEN), batch_of([1]), arena, start, start + 1)
        assert (found is None) == (start >= MOST_GRAPHS)
    assert graphs.count == pool.captures == MOST_GRAPHS
    assert graphs.run(torch.zeros(1, HIDDEN), batch_of([1]), arena, 0, 1) is not None  # what is there goes on


def test_keys_and_values_are_projected_for_the_tokens_and_for_no_padding() -> None:
    pool, blocks, arena = FakePool(), Blocks(), pages()
    graphs = DecodeGraphs(blocks, 600, pool)
    graphs.project_kv(torch.zeros(4, HIDDEN), batch_of([1] * 4), arena, 2, 4)
    for batch in (batch_of([1, 1, 1]), packed(batch_of([1, 1, 1]), 4), packed(batch_of([3], 600), 4)):
        hidden = torch.randn(3, HIDDEN)
        assert graphs.project_kv(hidden, batch, arena, 2, 4)
        states, slots = blocks.projected[-1]
        assert torch.equal(states[:3], hidden)
        assert slots.tolist() == [50, 51, 52, -1]
    assert pool.captures == 1


def test_a_pass_that_is_refused_leaves_nothing_behind() -> None:
    pool, arena = FakePool(), pages()
    graphs = DecodeGraphs(Blocks(), 600, pool)
    batch = packed(batch_of([1, 1, 1]), 4)
    layout = PassLayout(4, 4)
    asked = PassInputs(layout, torch.zeros(layout.count, dtype=torch.int64), (), propagates=False, last=0)
    hidden = torch.zeros(3, HIDDEN)

    def passed() -> PassResults | None:
        return graphs.run_pass(asked, lambda states: states.float(), 2, hidden, batch, arena)

    pool.free = 0
    for _ in range(3):
        assert passed() is None
    assert (graphs.count, pool.nbytes, graphs._exits, graphs._numbers) == (0, 0, {}, {})
    pool.free = TOTAL
    for _ in range(ASKED_AGAIN):
        if passed() is not None:
            break
    found = passed()
    assert found is not None
    assert torch.equal(found.states, 2.0 * batch.positions[:3, None].expand(3, HIDDEN))
    assert found.logits.shape == (4, HIDDEN)
    assert found.left_at.tolist() == [0] * 4
    assert graphs.count == 1


def test_passes_that_do_different_things_have_graphs_of_their_own() -> None:
    unread: Any = None
    own = PassExit(0, 1, True, False, GateSteps("one", unread, False, False), lambda states: states)
    changed: list[dict[str, Any]] = [
        *({"index": 1}, {"depth": 2}, {"asked": False}, {"takes_in": True}),
        *({"steps": GateSteps("other", unread, False, False)}, {"project": lambda states: 2 * states}),
    ]
    asked = PassInputs(PassLayout(4, 4), torch.zeros(24, dtype=torch.int64), (own,), False, 1)
    others = [replace(asked, exits=(replace(own, **change),)) for change in changed]
    others += [replace(asked, layout=PassLayout(4, 8)), replace(asked, propagates=True)]
    assert len({each.key for each in (asked, *others)}) == 1 + len(others)


def test_what_a_pass_left_is_not_the_next_ones() -> None:
    graphs, arena = DecodeGraphs(Blocks(), 600, FakePool()), pages()
    layout = PassLayout(4, 4)
    asked = PassInputs(layout, torch.zeros(layout.count, dtype=torch.int64), (), propagates=False, last=0)
    found = []
    for counts in ([1, 1, 1], [1, 1, 1, 1]):
        batch = packed(batch_of(counts), 4)
        hidden = torch.randn(len(counts), HIDDEN)
        one = graphs.run_pass(asked, lambda states: 3 * states, 2, hidden, batch, arena)
        assert one is not None
        found.append((one, hidden + 2 * batch.positions[:, None]))
    for one, states in found:
        assert torch.equal(one.states, states)
        assert torch.equal(one.logits, 3 * states[:1].expand(4, HIDDEN))  # of token 0, as the numbers say
    assert graphs.count == 1
