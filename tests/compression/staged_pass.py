"""A pass through a whole model a stage at a time, which one native call is held to: cases, reference, comparison."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.compression.exit_output import Shortlist
from exeunt.compression.exits import ExitConfirmation, ExitHead, ExitJudge, ExitProbe
from exeunt.compression.model_pass import ModelPass
from exeunt.compression.norm import Norm
from exeunt.compression.variant import KVFormat
from exeunt.kernels.model_pass import AtExit, PassBatch, Passed, PassRows, PassTokens
from exeunt.kernels.paged_batch import PagedBatch
from exeunt.kernels.token_draw import draw_tokens
from tests.compression.paged_generation import Sequences

UNITS, INF = 16, float("inf")


def random_exits(decoder: Decoder) -> tuple[ExitHead, ExitHead]:
    """Exits behind the first and the third block; the first looks at a shortlist, which all logits confirm."""
    g = torch.Generator().manual_seed(5)
    hidden, dtype = decoder.spec.hidden_size, decoder.dtype

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    def head(block: int) -> ExitHead:
        kind = decoder.spec.norm
        bias = random(hidden).to(dtype) if kind == "layer" else None
        norm = Norm(kind, (1 + 0.1 * random(hidden)).to(dtype), bias, decoder.spec.norm_eps)
        probe = ExitProbe(random(UNITS, hidden) / 5, random(UNITS), random(UNITS) / 2, random())
        adapter = (random(hidden, hidden) / 10).to(dtype)
        return ExitHead(block, norm, adapter, probe, torch.tensor([0.7, 0.2, 0.1, 0.0]), 0.4)

    judge = ExitJudge(random(5, UNITS) / 5, random(UNITS) / 5, random(UNITS) / 2, random())
    last = ExitConfirmation(judge, torch.tensor([0.5, 0.2, 0.1, 0.3]), 0.5)
    shortlist = Shortlist(torch.arange(0, decoder.spec.vocab_size, 3))
    return replace(head(0), judge=judge, shortlist=shortlist, confirmation=last), head(2)


@dataclass(frozen=True)
class Case:
    """A row of a pass: new tokens, how many wait behind an exit, what it does there."""

    new: int = 1
    waiting: dict[int, int] = field(default_factory=dict)  # by where they come in
    asks: int = 0  # exits that the newest token asks, as bits
    threshold: float = INF
    at_exit: AtExit = AtExit.LEAVES
    wanted: int = 1  # of the last tokens

    @property
    def entry(self) -> int:
        return 0 if self.new else min(self.waiting)

    @property
    def entries(self) -> list[int]:
        return [entry for entry in sorted(self.waiting, reverse=True) for _ in range(self.waiting[entry])] + [
            0
        ] * self.new


STEP = (
    Case(asks=3, threshold=0.95),
    Case(),
    Case(asks=3, threshold=0.6),
    Case(asks=2, threshold=0.9999),
    Case(asks=3, threshold=0.5),
    Case(),
    Case(asks=1, threshold=1.1),
    Case(asks=3, threshold=0.3),
    Case(asks=1, threshold=0.9),
)
ALL = (
    Case(asks=3, threshold=0.5),
    Case(new=9, wanted=0),  # a chunk of a prompt
    Case(asks=1, threshold=0.6, at_exit=AtExit.WAITS),
    Case(waiting={1: 2}, asks=3, threshold=0.7, at_exit=AtExit.WAITS, wanted=3),
    Case(new=3, waiting={2: 1}, at_exit=AtExit.STAYS, wanted=4),  # drafts that were looked up
    Case(waiting={1: 1, 2: 2}, asks=3, threshold=0.3, at_exit=AtExit.STAYS),
    Case(new=0, waiting={1: 2}, at_exit=AtExit.STAYS, wanted=2),
    Case(asks=2, threshold=0.4),
    Case(new=0, waiting={2: 1}, at_exit=AtExit.STAYS),
    Case(waiting={2: 1}, asks=3, threshold=0.55, at_exit=AtExit.WAITS),
    Case(asks=2, threshold=0.2, at_exit=AtExit.WAITS),
)


def changed(cases: Sequence[Case], threshold: float) -> list[Case]:
    """The same with another threshold for all who ask."""
    return [replace(case, threshold=threshold) for case in cases]


@dataclass
class Prepared:
    """A pass over sequences that have a past, and where their tokens are."""

    decoder: Decoder
    held: Sequences
    cases: Sequence[Case]
    batch: PagedBatch  # of all tokens
    states: Tensor  # where tokens come in, embedded those that do at the front
    native: PassBatch
    tokens: PassTokens

    def row_of(self, token: int) -> int:
        return int(torch.searchsorted(self.batch.query_starts, token, right=True)) - 1

    def some(self, tokens: list[int]) -> PagedBatch:
        """The geometry of some of the tokens, ascending."""
        rows = [self.row_of(token) for token in tokens]
        there = sorted(set(rows))
        starts = np.cumsum([0, *(rows.count(row) for row in there)])
        return PagedBatch(
            self.batch.positions[tokens],
            self.batch.slots[tokens],
            torch.tensor(starts, dtype=torch.int32),
            self.batch.page_tables[there].contiguous(),
            self.batch.max_context,
        )


def prepared(decoder: Decoder, format: KVFormat, cases: Sequence[Case], keys: Tensor | None) -> Prepared:
    held = Sequences(decoder, rows=len(cases), max_tokens=60, format=format)
    ends = [3 + 4 * row for row in range(len(cases))]
    spans = [range(end, end + len(case.entries)) for end, case in zip(ends, cases, strict=True)]
    for before in (
        [range(end) for end in ends],
        spans,
    ):  # those that wait were in the blocks in front, the rest harms not
        batch = held.batch(before)
        ids = torch.arange(batch.tokens) % (decoder.spec.vocab_size - 7)
        decoder.run_blocks(decoder.embed(ids, batch.positions), batch, held.pages, 0, decoder.spec.blocks)
    tokens, rows = PassTokens(), PassRows()
    for row, (case, span) in enumerate(zip(cases, spans, strict=True)):
        older = len(span) - 1
        tokens.positions += span
        tokens.entries += case.entries
        tokens.asks += [*([0] * older), case.asks]
        tokens.thresholds += [*([INF] * older), case.threshold]
        tokens.wants_logits += [at > older - case.wanted for at in range(len(span))]
        tokens.temperatures += [0.9 * (row % 2)] * len(span)
        rows.tokens.append(len(span))
        rows.entries.append(case.entry)
        rows.at_exits.append(case.at_exit)
        rows.pages.append(held.tables[row].numpy())
    count = len(tokens.positions)
    tokens.slots = batch.slots.tolist()
    tokens.ids = [3 + 5 * token % 40 for token in range(count)]
    tokens.keys = [7919 * key % 4001 - 2000 for key in range(2 * count)]
    states = decoder.embed(torch.tensor(tokens.ids), batch.positions)
    waits = torch.tensor(tokens.entries) > 0
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).to(states.dtype)
    states[waits] = noise[waits]
    return Prepared(decoder, held, cases, batch, states, PassBatch(tokens, rows, keys), tokens)


@dataclass
class Staged:
    """What a pass a stage at a time comes to, as in `Passed`."""

    with_logits: list[int] = field(default_factory=list)
    logits_of: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    gated: list[int] = field(default_factory=list)
    ends_piece: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


def joined(made: Prepared, going: list[int], entry: int) -> list[int]:
    """The tokens on their way with those that come in at `entry`."""
    there = {made.row_of(token) for token in going}
    there |= {row for row, case in enumerate(made.cases) if case.entry == entry}
    coming = [
        token for token, its in enumerate(made.tokens.entries) if its == entry and made.row_of(token) in there
    ]
    return sorted(going + coming)


def by_stages(made: Prepared, exits: tuple[ExitHead, ...]) -> tuple[Staged, list[int], Tensor]:
    """Returns what was counted, where each token stopped, and its state there."""
    decoder, pages, asked_by = made.decoder, made.held.pages, made.tokens.asks
    found, states = Staged(), made.states.clone()
    stopped, heard = [-1] * len(states), set[int]()
    going, start, blocks = joined(made, [], 0), 0, decoder.spec.blocks
    for place, head in enumerate(exits):
        found.tokens.append(len(going))
        found.rows.append(len({made.row_of(token) for token in going}))
        if going:
            states[going] = decoder.run_blocks(states[going], made.some(going), pages, start, head.depth)
        start = head.depth
        may = [token for token in going if asked_by[token] >> place & 1]
        asking = [token for token in may if token not in heard]
        leaving: list[int] = []
        if asking:
            thresholds = torch.tensor([made.tokens.thresholds[token] for token in asking])
            gate = head.gate(states[asking], thresholds, decoder.project_exit)
            leaving = [token for token, leaves in zip(asking, gate.leaves.tolist(), strict=True) if leaves]
            found.logits.append(gate.logits)
        found.with_logits += leaving
        found.logits_of.append(len(leaving))
        found.gated.append(len(asking))
        heard |= set(leaving)
        kinds = {token: made.cases[made.row_of(token)].at_exit for token in leaving}
        gone = [token for token in leaving if kinds[token] == AtExit.LEAVES]
        if gone:
            decoder.project_kv(states[gone], made.some(gone), pages, start, blocks)
        waits = {made.row_of(token) for token in leaving if kinds[token] == AtExit.WAITS}
        gone += [token for token in going if made.row_of(token) in waits]
        for token in gone:
            stopped[token] = place
        before = [token for token in going if token not in gone]
        going = joined(made, before, place + 1)
        found.ends_piece.append(int(bool(may) or going != before))
    found.tokens.append(len(going))
    found.rows.append(len({made.row_of(token) for token in going}))
    if going:
        states[going] = decoder.run_blocks(states[going], made.some(going), pages, start, blocks)
    for token in going:
        stopped[token] = len(exits)
    wanted = [token for token in going if made.tokens.wants_logits[token] and token not in heard]
    found.with_logits += wanted
    found.logits_of.append(len(wanted))
    if wanted:
        found.logits.append(decoder.head(states[wanted]))
    return found, stopped, states


def compared(
    decoder: Decoder, format: KVFormat, cases: Sequence[Case], exits: tuple[ExitHead, ...] | None = None
) -> Passed:
    """Run a pass both ways and compare; returns what it came to."""
    exits = random_exits(decoder) if exits is None else exits
    keys = torch.arange(decoder.spec.vocab_size, dtype=torch.int32) * 7919
    fast, slow = (prepared(decoder, format, cases, keys) for _ in range(2))
    whole = ModelPass.of(decoder, exits)
    assert whole is not None
    assert whole.takes(fast.native, fast.held.pages)
    before = list(decoder.block_calls.tokens), list(decoder.block_calls.calls)
    wanted, stopped, states = by_stages(slow, exits)
    between = list(decoder.block_calls.tokens), list(decoder.block_calls.calls)
    given = fast.states.clone()
    given[torch.tensor(fast.tokens.entries) == 0] = torch.nan  # embedded anew
    found = whole.run(given, fast.native, fast.held.pages)
    for name in ("with_logits", "logits_of", "tokens", "rows", "gated", "ends_piece"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert found.stopped == stopped
    assert torch.equal(found.states, states)
    logits = torch.cat(wanted.logits) if wanted.logits else torch.empty(0, decoder.spec.vocab_size)
    assert torch.equal(found.logits, logits)
    assert torch.equal(fast.held.pages.arena, slow.held.pages.arena)
    for now, then, first in zip(
        (decoder.block_calls.tokens, decoder.block_calls.calls), between, before, strict=True
    ):
        assert [n - m for n, m in zip(now, then, strict=True)] == [
            m - n for m, n in zip(then, first, strict=True)
        ]
    for seconds, gate, asked in zip(found.seconds[:-1], found.gate_seconds, found.gated, strict=True):
        assert seconds >= gate >= 0
        assert (gate > 0) == (asked > 0)
    assert len(found.seconds) == len(exits) + 1
    assert (found.drawn is None) == (whole.native.head is None)
    if found.drawn is not None and found.with_logits:
        temperatures = torch.tensor([fast.tokens.temperatures[token] for token in found.with_logits])
        own = torch.tensor(fast.tokens.keys, dtype=torch.int32).view(-1, 2)[found.with_logits]
        ids, logprobs = draw_tokens(logits, logits, temperatures, own, keys)
        assert found.drawn == (ids.tolist(), logprobs.tolist())
    return found
