"""A pass of rows with a past, run as the device decides it and by asking each exit, and both compared."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.compression.device_pass import (
    PassExit,
    PassInputs,
    PassLayout,
    PassResults,
    logit_rows,
)
from exeunt.compression.exits import ExitHead
from exeunt.compression.graph_pool import size_for
from exeunt.compression.variant import KVFormat
from exeunt.kernels.model_pass import AtExit
from tests.compression.gpu.exit_forms import Form, exit_of_form
from tests.compression.paged_generation import Sequences, padded
from tests.compression.pass_by_rows import pass_by_rows
from tests.compression.staged_pass import Case, changed

UNITS, VOCAB, INF = 5, 105, float("inf")
LAST = 2  # exits, behind the first block and the second of three


class Pass:
    """A pass of rows that have some tokens behind them, in pages of their own."""

    def __init__(self, decoder: Decoder, kv: KVFormat, heads: list[ExitHead], cases: Sequence[Case]) -> None:
        self.decoder, self.heads, self.cases = decoder, heads, cases
        self._given: list[Tensor] = []
        counts = [len(case.entries) for case in cases]
        ends = [2 + row % 5 for row in range(len(cases))]
        self.sequences = Sequences(decoder, rows=len(cases), max_tokens=24, format=kv)
        whole = self.sequences.batch([range(end + count) for end, count in zip(ends, counts, strict=True)])
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(0, VOCAB, (whole.tokens,), generator=generator).to(decoder.device)
        # those that wait were in the blocks in front, and what the others leave there is written again
        decoder.run_blocks(
            decoder.embed(ids, whole.positions), whole, self.sequences.pages, 0, decoder.spec.blocks
        )
        own = self.sequences.batch([range(end, end + count) for end, count in zip(ends, counts, strict=True)])
        size = size_for(own.tokens)
        assert size is not None
        self.batch = padded(own, self.sequences.pages.layout.page_tokens, size)
        noise = torch.randn(own.tokens, decoder.spec.hidden_size, generator=generator)
        self.entries = [entry for case in cases for entry in case.entries]
        waits = torch.tensor(self.entries).to(decoder.device)[:, None] > 0
        embedded = decoder.embed(ids[: own.tokens], own.positions)
        self.hidden = torch.where(waits, noise.to(embedded), embedded)

    @property
    def arena(self) -> Tensor:
        """All bytes of the pages."""
        return self.sequences.pages.arena

    def inputs(self, threshold: float) -> PassInputs:
        """What the cases say, with this threshold for all who ask one."""
        cases, entries = changed(self.cases, threshold), self.entries
        starts = torch.tensor([0, *(len(case.entries) for case in cases)]).cumsum(0).tolist()
        rows = [row for row, case in enumerate(cases) for _ in case.entries]
        newest = {start - 1: case.asks for start, case in zip(starts[1:], cases, strict=True)}
        wanted = [
            token
            for token, row in enumerate(rows)
            if starts[row + 1] - token <= cases[row].wanted or newest.get(token)
        ]
        size = size_for(len(rows))
        logits = None if size is None else logit_rows(len(wanted), size)
        assert size is not None
        assert logits is not None
        layout = PassLayout(size, logits)
        numbers = torch.zeros(layout.count, dtype=torch.int64)
        of_entries, gate_rows = layout.of_tokens(numbers)
        of_entries[: len(entries)] = torch.tensor(entries)
        gate_rows.fill_(logits)
        of_logits = numbers[2 * size :].view(4, -1)
        for n, token in enumerate(wanted):
            case = cases[rows[token]]
            asks = newest.get(token, 0)
            of_logits[:, n] = torch.tensor([token, asks, int(case.at_exit), 0])
            asked = torch.tensor(case.threshold if asks else INF).double()
            of_logits[3, n] = asked.view(torch.int64)
            if asks:
                gate_rows[starts[rows[token]] : token + 1] = n
        exits = tuple(
            PassExit(
                place,
                head.depth,
                any(case.asks >> place & 1 for case in cases),
                place + 1 in entries or any(case.at_exit != AtExit.LEAVES for case in cases),
                head.steps,
                self.decoder.project_exit,
            )
            for place, head in enumerate(self.heads)
        )
        propagates = any(case.at_exit == AtExit.LEAVES for case in cases)
        return PassInputs(layout, numbers.to(self.decoder.device), exits, propagates, LAST)

    def by_rows(self, asked: PassInputs) -> PassResults:
        given = (self.hidden, self.batch, self.sequences.pages, asked)
        return pass_by_rows(self.heads, self.decoder, *given)

    def passed(self, asked: PassInputs) -> PassResults:
        """What a graph leaves; what it was given is then NaN, so that a graph that reads it at its next run shows."""
        given = self.hidden.clone()
        found = self.decoder.run_pass(given, self.batch, self.sequences.pages, asked)
        assert found is not None
        self._given.append(given.fill_(torch.nan))  # kept, for its memory would be the next one's
        return found


def check_pass(
    decoder: Decoder,
    kv: KVFormat,
    forms: tuple[Form, Form],
    cases: Sequence[Case],
    *,
    shares: Sequence[float],
    rounds: int,
    capture: Callable[[Decoder], None],
) -> None:
    """Hold a pass in graphs to the one that asks, at thresholds of which such shares of all confidences are below.

    `capture` has the decoder run in graphs, whose passes are run `rounds` times.
    """
    heads = [
        exit_of_form(decoder, block, form, seed=block, units=UNITS, listed=VOCAB)
        for block, form in enumerate(forms)
    ]
    with torch.inference_mode():
        made = Pass(decoder, kv, heads, cases)
        before = made.arena.clone()
        states = decoder.run_blocks(made.hidden, made.batch, made.sequences.pages, 0, 1)
        sure = heads[0].gate(states, torch.zeros(len(states)), decoder.project_exit).confidence
        asks = [made.inputs(float(sure.quantile(share))) for share in shares]
        wanted = []
        for asked in asks:
            made.arena.copy_(before)
            wanted.append((made.by_rows(asked), made.arena.clone()))
        capture(decoder)
        for _ in range(rounds):
            for asked, (expected, pages) in zip(asks, wanted, strict=True):
                made.arena.copy_(before)
                found = made.passed(asked)
                assert torch.equal(found.left_at, expected.left_at)
                assert _same(found.logits, expected.logits)
                assert _same(found.states, expected.states)
                assert torch.equal(made.arena, pages)
    left = [int((expected.left_at < LAST).sum()) for expected, _ in wanted]
    asking = sum(bool(case.asks) for case in cases)
    if asking:
        assert max(left) > 0
    if asking > 1:
        assert any(0 < some < asking for some in left)


def _same(found: Tensor, wanted: Tensor) -> bool:
    """Whether they are the same bits wherever what is wanted is somebody's."""
    mine = ~wanted.isnan()
    return torch.equal(found[: len(wanted)][mine], wanted[mine])
