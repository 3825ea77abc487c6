"""A pass in one native call against the same pass a stage at a time: the same bits, whatever leaves and joins where."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import exeunt.kernels.decode_pass.native
from exeunt.compression.decode_pass import DecodePass
from exeunt.compression.decoder import Decoder
from exeunt.compression.exit_output import Shortlist
from exeunt.compression.exits import ExitConfirmation, ExitHead, ExitJudge, ExitProbe
from exeunt.compression.linear import Int4Linear
from exeunt.compression.norm import Norm
from exeunt.compression.variant import KVFormat
from exeunt.kernels.decode_pass import AtExit, PassBatch, Passed, PassRows, PassTokens
from exeunt.kernels.int4_linear import quantize
from exeunt.kernels.native.library import native_library
from exeunt.kernels.paged_batch import PagedBatch
from exeunt.kernels.token_draw import draw_tokens
from tests.compression.paged_generation import Sequences
from tests.compression.test_native_blocks import a_decoder

pytestmark = pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)
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
        tokens.wanted += [at > older - case.wanted for at in range(len(span))]
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

    told: list[int] = field(default_factory=list)
    spoke: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
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
        found.told += leaving
        found.spoke.append(len(leaving))
        found.asked.append(len(asking))
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
        found.cut.append(int(bool(may) or going != before))
    found.tokens.append(len(going))
    found.rows.append(len({made.row_of(token) for token in going}))
    if going:
        states[going] = decoder.run_blocks(states[going], made.some(going), pages, start, blocks)
    for token in going:
        stopped[token] = len(exits)
    wanted = [token for token in going if made.tokens.wanted[token] and token not in heard]
    found.told += wanted
    found.spoke.append(len(wanted))
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
    whole = DecodePass.of(decoder, exits)
    assert whole is not None
    assert whole.takes(fast.native, fast.held.pages)
    before = list(decoder.block_calls.tokens), list(decoder.block_calls.calls)
    wanted, stopped, states = by_stages(slow, exits)
    between = list(decoder.block_calls.tokens), list(decoder.block_calls.calls)
    given = fast.states.clone()
    given[torch.tensor(fast.tokens.entries) == 0] = torch.nan  # embedded anew
    found = whole.run(given, fast.native, fast.held.pages)
    for name in ("told", "spoke", "tokens", "rows", "asked", "cut"):
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
    for seconds, gate, asked in zip(found.seconds, found.gate_seconds, found.asked, strict=True):
        assert seconds >= gate >= 0
        assert (gate > 0) == (asked > 0)
    assert (found.drawn is None) == (whole.native.head is None)
    if found.drawn is not None and found.told:
        temperatures = torch.tensor([fast.tokens.temperatures[token] for token in found.told])
        own = torch.tensor(fast.tokens.keys, dtype=torch.int32).view(-1, 2)[found.told]
        ids, logprobs = draw_tokens(logits, logits, temperatures, own, keys)
        assert found.drawn == (ids.tolist(), logprobs.tolist())
    return found


@pytest.mark.parametrize("linear_block", [False, True])
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize("format", ["full", "int4"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen3"])
def test_a_pass_has_the_bits_of_its_stages(
    name: str, format: KVFormat, int4: bool, linear_block: bool, tmp_path: Path
) -> None:
    decoder = a_decoder(name, tmp_path, torch.float32, int4, linear_block)
    assert 0 < sum(compared(decoder, format, STEP).spoke[:2]) < len(STEP) - 2
    assert compared(decoder, format, changed(STEP, 0.0)).spoke[0] > 0
    assert compared(decoder, format, changed(STEP, 2.0)).spoke[:2] == [0, 0]
    assert compared(decoder, format, [replace(case, asks=0) for case in STEP]).cut == [0, 0]
    compared(decoder, format, [replace(case, asks=0) for case in STEP], ())
    compared(decoder, format, ALL)
    everyone = compared(decoder, format, changed(ALL, 0.0))
    assert -1 in everyone.stopped  # what waited where its row did not come by
    compared(decoder, format, changed(ALL, 2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_pass_in_16_bits_has_the_bits_of_its_stages(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    decoder = a_decoder(name, tmp_path, dtype, False, False)
    for cases in (STEP, ALL):
        for threshold in (0.0, 0.5, 2.0):
            compared(decoder, "full", changed(cases, threshold))
            compared(decoder, "int4", changed(cases, threshold))


@pytest.mark.parametrize("seed", range(6))
def test_any_rows_have_the_bits_of_their_stages(seed: int, tmp_path: Path) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, True)
    g = np.random.default_rng(seed)
    for _ in range(8):
        cases = []
        for _ in range(int(g.integers(1, 14))):
            new, waiting = (
                int(g.integers(0, 4)),
                {n: int(g.integers(1, 3)) for n in (1, 2) if g.random() < 0.4},
            )
            if not (new or waiting):
                new = 1
            kind, asks = AtExit(int(g.integers(0, 3))), int(g.integers(0, 4)) * (new > 0)
            if kind is AtExit.LEAVES and (waiting or new > 1):
                kind = AtExit.STAYS
            cases.append(Case(new, waiting, asks, float(g.uniform(0.2, 0.9)), kind, int(g.integers(0, 4))))
        compared(decoder, "int4" if g.random() < 0.5 else "full", cases)


def test_exits_may_read_another_form_of_the_output_matrix(tmp_path: Path) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, False)
    weight = torch.randn(decoder.spec.vocab_size, decoder.spec.hidden_size)
    decoder.let_exits_read(Int4Linear(quantize(weight, 8)))
    assert sum(compared(decoder, "full", STEP).spoke[:2]) > 0


def test_nothing_is_drawn_where_nobody_asks(tmp_path: Path) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, False)
    made = prepared(decoder, "full", STEP, None)
    whole = DecodePass.of(decoder, random_exits(decoder))
    assert whole is not None
    assert whole.run(made.states, made.native, made.held.pages).drawn is None


def test_what_the_kernels_do_not_take_has_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, False)
    exits = random_exits(decoder)
    whole = DecodePass.of(decoder, exits)
    assert whole is not None
    made = prepared(decoder, "full", STEP, None)
    most = made.native.most_told
    assert most == len(STEP)
    monkeypatch.setattr(exeunt.kernels.decode_pass.native, "MOST_LOGITS", decoder.spec.vocab_size * most)
    assert whole.takes(made.native, made.held.pages)
    monkeypatch.setattr(exeunt.kernels.decode_pass.native, "MOST_LOGITS", decoder.spec.vocab_size * most - 1)
    assert not whole.takes(made.native, made.held.pages)
    with pytest.raises(ValueError, match="room is for"):
        whole.run(made.states, made.native, made.held.pages)
    monkeypatch.undo()

    class Other(type(decoder.output)):  # type: ignore[misc] # a matrix of another kind
        pass

    decoder.let_exits_read(Other(torch.randn(decoder.spec.vocab_size, decoder.spec.hidden_size)))
    assert DecodePass.of(decoder, exits) is None
    assert DecodePass.of(decoder, ()) is not None  # nothing asks them
    monkeypatch.setattr(Decoder, "native_blocks", None)
    assert DecodePass.of(decoder, ()) is None


WRONG: list[tuple[str, list[int | float]]] = [
    ("entries", [0, 3]),
    ("entries", [0, -1]),
    ("asks", [0, 4]),
    ("asks", [0, -1]),
    ("ids", [0, 1 << 20]),
    ("ids", [0, -1]),
]


@pytest.mark.parametrize(("name", "values"), WRONG)
def test_a_token_that_names_what_there_is_not_is_refused(
    name: str, values: list[int | float], tmp_path: Path
) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, False)
    whole = DecodePass.of(decoder, random_exits(decoder))
    assert whole is not None
    made = prepared(decoder, "full", STEP[:2], None)
    rows = PassRows([1, 1], [0, 0], [AtExit.STAYS] * 2, [table.numpy() for table in made.held.tables[:2]])
    before = made.held.pages.arena.clone()
    setattr(made.tokens, name, values)
    with pytest.raises(ValueError, match="does not know"):
        whole.run(made.states, PassBatch(made.tokens, rows), made.held.pages)
    assert torch.equal(made.held.pages.arena, before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"entries": [0, 3]},
        {"at_exits": [AtExit.STAYS, 3]},
        {"at_exits": [AtExit.STAYS, -1]},
        {"tokens": [2, 0]},
    ],
)
def test_a_row_that_names_what_there_is_not_is_refused(wrong: dict[str, list[int]], tmp_path: Path) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, False)
    whole = DecodePass.of(decoder, random_exits(decoder))
    assert whole is not None
    made = prepared(decoder, "full", STEP[:2], None)
    tables = [table.numpy() for table in made.held.tables[:2]]
    rows = PassRows([1, 1], [0, 0], [AtExit.STAYS] * 2, tables)
    for name, values in wrong.items():
        setattr(rows, name, values)
    with pytest.raises(ValueError, match="does not know"):
        whole.run(made.states, PassBatch(made.tokens, rows), made.held.pages)


def test_positions_past_the_learned_ones_are_refused(tmp_path: Path) -> None:
    decoder = a_decoder("gpt2", tmp_path, torch.float32, False, False)
    whole = DecodePass.of(decoder, random_exits(decoder))
    assert whole is not None
    made = prepared(decoder, "full", STEP[:1], None)
    assert decoder.embedding.positions is not None
    made.tokens.positions = [len(decoder.embedding.positions)]
    rows = PassRows([1], [0], [AtExit.STAYS], [made.held.tables[0].numpy()])
    with pytest.raises(ValueError, match="does not know"):
        whole.run(made.states, PassBatch(made.tokens, rows), made.held.pages)


@pytest.mark.parametrize(
    "name", ["slots", "entries", "asks", "wanted", "ids", "thresholds", "temperatures", "keys"]
)
def test_lists_of_different_lengths_are_no_batch(name: str, tmp_path: Path) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, False)
    made = prepared(decoder, "full", STEP[:1], None)
    rows = PassRows([1], [0], [AtExit.STAYS], [made.held.tables[0].numpy()])
    assert PassBatch(made.tokens, rows).tokens == 1
    getattr(made.tokens, name).append(0)
    with pytest.raises(ValueError, match="a pass of 1 tokens and 1 rows"):
        PassBatch(made.tokens, rows)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, False)
    exits = random_exits(decoder)
    whole = DecodePass.of(decoder, exits)
    assert whole is not None
    made = prepared(decoder, "full", STEP, None)
    with pytest.raises(ValueError, match="hidden is"):
        whole.run(made.states[:8], made.native, made.held.pages)
    with pytest.raises(ValueError, match="hidden is"):
        whole.run(made.states.double(), made.native, made.held.pages)
    for depths, message in (((2, 2), "behind"), ((0, 2), "behind"), ((2, 99), "behind")):
        gates = tuple((depth, gate) for depth, (_, gate) in zip(depths, whole.native.exits, strict=True))
        with pytest.raises(ValueError, match=message):
            replace(whole.native, exits=gates)
    with pytest.raises(ValueError, match="a gate takes"):
        replace(whole.native, vocab=whole.native.vocab - 1)
    assert whole.native.head is not None
    with pytest.raises(ValueError, match="the head is"):
        replace(whole.native, exits=(), head=(whole.native.head[0][:-1], whole.native.head[1]))
    with pytest.raises(ValueError, match="an embedding is"):
        replace(whole.native, embedding=(decoder.embedding.tokens[:, :-1], None))
