"""A step whose exits the device decides: to the bit what asking each exit and taking its rows out gives."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exeunt.compression.decided_pass import AskedExit, DecidedPass
from exeunt.compression.decode_graphs import DecodeGraphs
from exeunt.compression.decoder import Decoder
from exeunt.compression.exit_output import Shortlist
from exeunt.compression.exits import ExitConfirmation, ExitHead, ExitJudge, ExitProbe
from exeunt.compression.norm import Norm
from exeunt.compression.variant import KVFormat
from exeunt.kernels.paged_batch import PagedBatch
from tests.compression.decide_by_rows import decide_by_rows
from tests.compression.fake_graphs import FakePool
from tests.compression.gpu.test_gpu_block import _decoder
from tests.compression.paged_generation import Sequences
from tests.kernels.triton.on_gpu import HERE, on_gpu_only

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as in test_gpu_block

UNITS, VOCAB = 5, 105
ROWS = 11 if HERE else 3  # no size that graphs are captured for, so that some are padding
BEFORE = 6  # tokens that each row has behind it


def _exit(decoder: Decoder, block: int, form: str) -> ExitHead:
    generator, hidden = torch.Generator().manual_seed(block), decoder.spec.hidden_size

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    head = ExitHead(
        block,
        Norm("rms", torch.ones(hidden), None, 1e-5),
        random(hidden, hidden) / 9,
        ExitProbe(random(UNITS, hidden) / 7, random(UNITS), random(UNITS), torch.tensor(0.5)),
        torch.tensor([0.8, 0.3, 0.2, 0.0]),
        0.3,
    )
    if form != "whole":
        judge = ExitJudge(random(4, UNITS) / 5, random(UNITS) / 5, random(UNITS), torch.tensor(0.0))
        head = replace(head, judge=judge, shortlist=Shortlist(torch.arange(0, VOCAB, 3)))
        if form == "confirmed":
            last = ExitConfirmation(judge, torch.tensor([0.6, 0.3, 0.2, 0.3]), 0.8)
            head = replace(head, confirmation=last)
    return head.to(decoder.device, decoder.dtype)


class Step:
    """A decode step of rows that have some tokens behind them, in pages of their own."""

    def __init__(self, decoder: Decoder, kv: KVFormat, heads: list[ExitHead]) -> None:
        self.decoder, self.heads = decoder, heads
        self.sequences = Sequences(decoder, rows=ROWS, max_tokens=BEFORE + 2, format=kv)
        ids = torch.randint(0, VOCAB, (ROWS, BEFORE + 1), generator=torch.Generator().manual_seed(7))
        ids = ids.to(decoder.device)
        batch = self.sequences.batch([range(BEFORE)] * ROWS)
        hidden = decoder.embed(ids[:, :BEFORE].flatten(), batch.positions)
        decoder.run_blocks(hidden, batch, self.sequences.pages, 0, decoder.spec.blocks)
        self.batch = self.sequences.batch([range(BEFORE, BEFORE + 1)] * ROWS)
        self.hidden = decoder.embed(ids[:, BEFORE], self.batch.positions)
        self.exits = [AskedExit(head.depth, head.steps, decoder.project_exit) for head in heads]

    @property
    def arena(self) -> Tensor:
        """All bytes of the pages."""
        return self.sequences.pages.arena

    def by_rows(self, thresholds: Tensor) -> DecidedPass:
        return decide_by_rows(
            self.heads, self.decoder, self.hidden, self.batch, self.sequences.pages, thresholds, self.exits
        )

    def decided(self, thresholds: Tensor, batch: PagedBatch | None = None) -> DecidedPass:
        host = thresholds.pin_memory() if self.decoder.device.type == "cuda" else thresholds
        found = self.decoder.decide(self.hidden, batch or self.batch, self.sequences.pages, host, self.exits)
        assert found is not None
        return found


def _capture(decoder: Decoder) -> None:
    """Have it run in graphs; in such as only do the same again where there is no GPU."""
    if decoder.device.type == "cuda":
        assert decoder.capture(64) is not None
        return
    assert decoder._rope is not None
    decoder._rope.reserve(512)
    decoder._graphs = DecodeGraphs(decoder._blocks, 64, FakePool())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("forms", "weights", "kv"),
    [
        (("listed", "whole"), "int4", "int4"),
        on_gpu_only(("whole", "whole"), "full", "full"),
        on_gpu_only(("confirmed",), "full", "int4"),
        on_gpu_only(("confirmed", "listed"), "int4", "full"),
    ],
)
def test_a_decided_step_is_the_one_that_asks(
    tmp_path: Path, device: torch.device, forms: tuple[str, ...], weights: str, kv: KVFormat
) -> None:
    dtype = torch.float32 if HERE else torch.bfloat16
    decoder = _decoder("llama", tmp_path, device, dtype, weights, num_hidden_layers=3)
    heads = [_exit(decoder, block, form) for block, form in enumerate(forms)]
    with torch.inference_mode():
        step = Step(decoder, kv, heads)
        before = step.arena.clone()
        states = step.by_rows(torch.full((ROWS,), torch.inf)).states
        sure = heads[0].gate(states[0], torch.zeros(ROWS), step.exits[0].project).confidence
        level = float(sure.median())
        asked = torch.full((ROWS,), level)
        asked[1] = torch.inf
        asks = [asked, torch.zeros(ROWS), torch.full((ROWS,), torch.inf)]
        asks = asks if HERE else asks[:2]
        wanted = []
        for thresholds in asks:
            step.arena.copy_(before)
            wanted.append((step.by_rows(thresholds), step.arena.clone()))
        _capture(decoder)
        for _ in range(1 + HERE):
            for thresholds, (expected, pages) in zip(asks, wanted, strict=True):
                step.arena.copy_(before)
                found = step.decided(thresholds)
                assert torch.equal(found.left_at, expected.left_at)
                assert torch.equal(found.logits, expected.logits)
                for place in range(len(heads)):
                    there = expected.left_at >= place
                    assert torch.equal(found.states[place][there], expected.states[place][there])
                assert torch.equal(step.arena, pages)
    shares = [int((expected.left_at < len(heads)).sum()) for expected, _ in wanted]
    assert shares[0] not in (0, ROWS)
    assert shares[1] > shares[0]
    assert shares[2:] == [0] * HERE
