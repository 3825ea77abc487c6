"""The numbers of a device's pass: where tokens are, where they come in, by which row of logits they leave."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from exeunt.compression.decode_graphs import padded_layout
from exeunt.compression.variant import Variant
from exeunt.kernels.model_pass import AtExit
from exeunt.server.device_inputs import DeviceInputs
from exeunt.server.device_passes import DevicePasses
from exeunt.server.held_states import HeldStates
from exeunt.server.pages import PagePool, PageTable
from exeunt.server.pass_parts import PassParts
from exeunt.server.request import ExitPolicy
from exeunt.server.row import Row
from exeunt.server.sequence import Sequence
from exeunt.server.stages import StagePlan
from exeunt.server.tick_batch import Part, _write

PAGE, HERE = 4, torch.device("cpu")
PROPAGATE = ExitPolicy("approximate", 0.3, None, "propagate")
BACKFILL = ExitPolicy("approximate", 0.7, None, "backfill")


def _sequence(pool: PagePool, tokens: int, exits: ExitPolicy) -> Sequence:
    table = PageTable(pool, PAGE)
    table.ensure(tokens + 1)
    return Sequence("s", Variant(), exits, list(range(100, 100 + tokens)), 1, table)


def _step(sequence: Sequence, threshold: float | None, *, deep: bool = False) -> Row:
    last = len(sequence.tokens) - 1
    return Row(sequence, [last], last + 1, deep=deep, threshold=threshold)


def _parts(*rows: Row) -> PassParts:
    parts = PassParts()
    for row in rows:
        parts.add(row, 3)
    return parts


def test_where_tokens_are_is_what_a_tick_by_stages_says() -> None:
    pool = PagePool(60)
    rows = [_step(_sequence(pool, tokens, PROPAGATE), 0.3) for tokens in (3, 9, 4)]
    made = DeviceInputs.of(_parts(*rows), PAGE, HERE, [7, 8, 9])
    assert made is not None
    layout = padded_layout(4, 9, PAGE)
    wanted = np.zeros(layout.numbers, dtype=np.int64)
    parts = [Part(row, row.positions) for row in rows]
    _write(layout, wanted, parts, [2, 8, 3])
    assert made.batch.packed is not None
    assert made.batch.packed.layout == layout
    assert made.batch.packed.numbers.tolist() == wanted.tolist()
    assert (made.batch.tokens, made.batch.rows, made.batch.max_context) == (3, 3, 9)
    assert made.batch.positions.tolist() == [2, 8, 3]
    assert made.beside.tolist() == [7, 8, 9]
    assert made.with_logits == [0, 1, 2]
    assert (made.layout.tokens, made.layout.logits) == (4, 4)


def test_tokens_that_wait_leave_with_their_row_and_chunks_with_none() -> None:
    pool = PagePool(60)
    waits = _sequence(pool, 6, BACKFILL)
    waits.put_back(1, [4])
    waits.put_back(2, [3])
    deep = _sequence(pool, 5, BACKFILL)
    deep.put_back(1, [3])
    prompt = _sequence(pool, 12, PROPAGATE)
    chunk = Row(prompt, [0, 1, 2], 3)
    rows = [chunk, _step(waits, 0.7), _step(_sequence(pool, 4, PROPAGATE), 0.3), _step(deep, 0.7, deep=True)]
    made = DeviceInputs.of(_parts(*rows), PAGE, HERE, [])
    assert made is not None
    assert (made.layout.tokens, made.layout.logits) == (16, 8)
    entries, gate_rows = (each.tolist() for each in made.layout.of_tokens(made.numbers))
    assert entries == [0, 0, 0, 2, 1, 0, 0, 1, 0] + [0] * 7
    assert made.with_logits == [5, 6, 8]
    assert gate_rows == [8, 8, 8, 0, 0, 0, 1, 2, 2] + [8] * 7
    tokens, asks, at_exits, thresholds = made.layout.of_logits(made.numbers)
    assert tokens.tolist() == [5, 6, 8, 0, 0, 0, 0, 0]
    assert asks.tolist() == [3, 3, 3, 0, 0, 0, 0, 0]
    assert at_exits.tolist()[:3] == [AtExit.WAITS, AtExit.LEAVES, AtExit.STAYS]
    assert torch.equal(thresholds[:3], torch.tensor([0.7, 0.3, 0.7]))
    assert made.batch.query_starts.tolist() == [0, 3, 6, 7, 9]


def test_one_graph_does_for_rows_that_wait_at_an_exit_and_for_those_that_go_on_from_there() -> None:
    pool, stand_in = PagePool(60), SimpleNamespace(steps=None, project_exit=None)
    model: Any = SimpleNamespace(exits=[stand_in] * 2)
    decoder: Any = stand_in
    unread: Any = None
    passes = DevicePasses(model, StagePlan(6, (1, 3)), {}, HeldStates(), unread)

    def kinds(exits: ExitPolicy, *, waits: bool) -> list[tuple[bool, bool]]:
        sequence = _sequence(pool, 6, exits)
        if waits:
            sequence.put_back(2, [4])
        found = passes._exits(decoder, _parts(_step(sequence, 0.5)))
        return [(each.asked, each.takes_in) for each in found]

    assert kinds(BACKFILL, waits=True) == kinds(BACKFILL, waits=False) == [(True, True)] * 2
    assert kinds(PROPAGATE, waits=False) == [(True, False)] * 2


def test_what_no_graph_is_captured_for_is_refused() -> None:
    pool = PagePool(2000)
    many = [_step(_sequence(pool, 2, PROPAGATE), 0.3) for _ in range(129)]
    assert DeviceInputs.of(_parts(*many), PAGE, HERE, []) is None
    assert DeviceInputs.of(_parts(*many[:128]), PAGE, HERE, []) is not None
    long = Row(_sequence(pool, 600, PROPAGATE), list(range(513)), 513)
    assert DeviceInputs.of(_parts(long, many[0]), PAGE, HERE, []) is None
