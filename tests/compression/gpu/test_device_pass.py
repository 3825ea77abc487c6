"""A pass whose exits the device decides: to the bit what asking each exit and taking its rows out gives."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from exeunt.compression.decode_graphs import DecodeGraphs
from exeunt.compression.decoder import Decoder
from exeunt.compression.device_pass import (
    PassExit,
    PassInputs,
    PassLayout,
    PassResults,
    logit_rows,
)
from exeunt.compression.exits import ExitHead
from exeunt.compression.graph_pool import Captured, size_for
from exeunt.compression.variant import KVFormat
from exeunt.kernels.model_pass import AtExit
from tests.compression.fake_graphs import FakePool
from tests.compression.gpu.exit_forms import Form, exit_of_form
from tests.compression.gpu.test_gpu_block import _decoder
from tests.compression.paged_generation import Sequences, padded
from tests.compression.pass_by_rows import pass_by_rows
from tests.compression.staged_pass import ALL, STEP, Case, changed
from tests.kernels.triton.on_gpu import HERE, on_gpu_only

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as in test_gpu_block

UNITS, VOCAB, INF = 5, 105, float("inf")
LAST = 2  # exits, behind the first block and the second of three
FEW = (  # of each kind one: more takes Triton's interpreter long
    Case(asks=3, threshold=0.5),
    Case(new=2, wanted=0),
    Case(waiting={1: 1, 2: 1}, asks=3, threshold=0.5, at_exit=AtExit.WAITS, wanted=3),
    Case(waiting={2: 1}, asks=1, threshold=0.5, at_exit=AtExit.STAYS, wanted=2),
    Case(asks=2, threshold=0.5),
    Case(new=0, waiting={1: 1}, at_exit=AtExit.STAYS),
    Case(asks=1, threshold=0.5, at_exit=AtExit.WAITS),
)


class Pass:
    """A pass of rows that have some tokens behind them, in pages of their own."""

    def __init__(self, decoder: Decoder, kv: KVFormat, heads: list[ExitHead], cases: Sequence[Case]) -> None:
        self.decoder, self.heads, self.cases = decoder, heads, cases
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
        found = self.decoder.run_pass(self.hidden, self.batch, self.sequences.pages, asked)
        assert found is not None
        return found


class _Once(FakePool):
    """Runs what it captures once, and not twice: the interpreter takes seconds for each time."""

    def _record(self, run: Callable[[], Any]) -> Captured[Any]:
        made = list(run())

        def replay() -> None:
            made[:] = run()

        return Captured(replay, made, 0)


def _capture(decoder: Decoder) -> None:
    """Have it run in graphs; in such as only do the same again where there is no GPU."""
    if decoder.device.type == "cuda":
        assert decoder.capture(64) is not None
        return
    assert decoder._rope is not None
    decoder._rope.reserve(512)
    decoder._graphs = DecodeGraphs(decoder._blocks, 64, _Once())


def _same(found: Tensor, wanted: Tensor) -> bool:
    """Whether they are the same bits wherever what is wanted is somebody's."""
    mine = ~wanted.isnan()
    return torch.equal(found[: len(wanted)][mine], wanted[mine])


@pytest.mark.parametrize(
    ("cases", "forms", "weights", "kv"),
    [
        (FEW, ("listed", "whole"), "int4", "int4"),
        on_gpu_only(ALL, ("whole", "whole"), "full", "full"),
        on_gpu_only(ALL, ("confirmed", "listed"), "int4", "full"),
        on_gpu_only(ALL, ("listed", "confirmed"), "full", "int4"),
        on_gpu_only(STEP, ("confirmed", "whole"), "int4", "int4"),
        on_gpu_only([case for case in ALL if not case.asks], ("whole", "whole"), "int4", "int4"),
        on_gpu_only(STEP[:1], ("whole", "whole"), "int4", "int4"),
    ],
)
def test_a_pass_of_the_device_is_the_one_that_asks(
    tmp_path: Path,
    device: torch.device,
    cases: Sequence[Case],
    forms: tuple[Form, Form],
    weights: str,
    kv: KVFormat,
) -> None:
    decoder = _decoder("llama", tmp_path, device, torch.bfloat16, weights, num_hidden_layers=3)
    heads = [
        exit_of_form(decoder, block, form, seed=block, units=UNITS, listed=VOCAB)
        for block, form in enumerate(forms)
    ]
    with torch.inference_mode():
        made = Pass(decoder, kv, heads, cases)
        before = made.arena.clone()
        states = decoder.run_blocks(made.hidden, made.batch, made.sequences.pages, 0, 1)
        sure = heads[0].gate(states, torch.zeros(len(states)), decoder.project_exit).confidence
        levels = [float(sure.quantile(share)) for share in ((0.0, 0.1, 0.3, 0.6, 0.9) if HERE else (0.6,))]
        asks, wanted = [made.inputs(level) for level in levels], []
        for asked in asks:
            made.arena.copy_(before)
            wanted.append((made.by_rows(asked), made.arena.clone()))
        _capture(decoder)
        for _ in range(1 + HERE):
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
