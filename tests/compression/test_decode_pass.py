"""A decode step in one native call against the same step a stage at a time: the same bits, whatever leaves where."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import exeunt.kernels.decode_pass.native
from exeunt.compression.decode_pass import DecodePass
from exeunt.compression.decoder import Decoder
from exeunt.compression.exit_output import Shortlist
from exeunt.compression.exits import ExitConfirmation, ExitHead, ExitJudge, ExitProbe
from exeunt.compression.kv_format import KVPages
from exeunt.compression.linear import Int4Linear
from exeunt.compression.norm import Norm
from exeunt.compression.variant import KVFormat
from exeunt.kernels.int4_linear import quantize
from exeunt.kernels.native.library import native_library
from exeunt.kernels.paged_batch import PagedBatch
from tests.compression.paged_generation import Sequences
from tests.compression.test_native_blocks import a_decoder

pytestmark = pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)
ROWS, UNITS = 9, 16


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


@dataclass
class Staged:
    """What a step a stage at a time comes to, in the order of `Passed`."""

    order: list[int]
    left: list[int]
    gated: list[int]
    logits: Tensor
    states: Tensor


def by_stages(
    decoder: Decoder,
    exits: tuple[ExitHead, ...],
    asked: list[int],
    hidden: Tensor,
    batch: PagedBatch,
    pages: KVPages,
    thresholds: Tensor,
) -> Staged:
    rows, start, blocks = list(range(len(hidden))), 0, decoder.spec.blocks
    order: list[int] = []
    left, gated, logits, states = [], [], [], []
    for head in (exits[place] for place in asked):
        if not rows:
            left.append(0)
            gated.append(0)
            continue
        hidden = decoder.run_blocks(hidden, batch, pages, start, head.depth)
        start = head.depth
        asking = [k for k, row in enumerate(rows) if thresholds[row].isfinite()]
        gated.append(len(asking))
        leaving: list[int] = []
        if asking:
            wanted = thresholds[[rows[k] for k in asking]]
            found = head.gate(hidden[asking], wanted, decoder.project_exit)
            leaving = [k for k, leaves in zip(asking, found.leaves.tolist(), strict=True) if leaves]
            if leaving:
                logits.append(found.logits)
                states.append(hidden[leaving])
                decoder.project_kv(hidden[leaving], batch.take(torch.tensor(leaving)), pages, start, blocks)
        left.append(len(leaving))
        order += [rows[k] for k in leaving]
        stay = [k for k in range(len(rows)) if k not in leaving]
        rows = [rows[k] for k in stay]
        if rows:
            hidden, batch = hidden[stay], batch.take(torch.tensor(stay))
    if rows:
        hidden = decoder.run_blocks(hidden, batch, pages, start, blocks)
        logits.append(decoder.head(hidden))
        states.append(hidden)
    return Staged(order + rows, left, gated, torch.cat(logits), torch.cat(states))


def prepared(decoder: Decoder, format: KVFormat) -> tuple[Sequences, PagedBatch, Tensor]:
    """Sequences of different lengths, and the step behind them: its geometry and the states in front of block 0."""
    held = Sequences(decoder, rows=ROWS, max_tokens=40, format=format)
    spans = [range(3 + 4 * row) for row in range(ROWS)]
    batch = held.batch(spans)
    ids = torch.arange(batch.tokens) % (decoder.spec.vocab_size - 7)
    decoder.run_blocks(decoder.embed(ids, batch.positions), batch, held.pages, 0, decoder.spec.blocks)
    step = held.batch([range(len(span), len(span) + 1) for span in spans])
    return held, step, decoder.embed(torch.arange(ROWS) + 2, step.positions)


THRESHOLDS = {
    "some": torch.tensor([0.95, torch.inf, 0.6, 0.9999, 0.5, torch.inf, 1.1, 0.3, 0.9]),
    "all leave": torch.zeros(ROWS),
    "none leaves": torch.full((ROWS,), 2.0),
    "none asks": torch.full((ROWS,), torch.inf),
}


def compared(decoder: Decoder, format: KVFormat, asked: list[int], thresholds: Tensor) -> list[int]:
    """Run a step both ways and compare; returns how many left at each exit."""
    exits = random_exits(decoder)
    fast, batch, hidden = prepared(decoder, format)
    slow, _, _ = prepared(decoder, format)
    whole = DecodePass.of(decoder, exits)
    assert whole is not None
    assert whole.takes(fast.pages, ROWS)
    before = list(decoder.block_calls.tokens), list(decoder.block_calls.calls)
    wanted = by_stages(decoder, exits, asked, hidden.clone(), batch, slow.pages, thresholds)
    calls = [n - m for n, m in zip(decoder.block_calls.tokens, before[0], strict=True)]
    found = whole.run(hidden, batch, fast.pages, asked, thresholds)
    assert (found.order, found.left, found.gated) == (wanted.order, wanted.left, wanted.gated)
    assert torch.equal(found.states, wanted.states)
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(fast.pages.arena, slow.pages.arena)
    twice = [n - m for n, m in zip(decoder.block_calls.tokens, before[0], strict=True)]
    assert twice == [2 * n for n in calls]
    assert [len(found.seconds), len(found.gate_seconds)] == [len(asked)] * 2
    for seconds, gate, gated in zip(found.seconds, found.gate_seconds, found.gated, strict=True):
        assert seconds >= gate >= 0
        assert (gate > 0) == (gated > 0)
    return found.left


@pytest.mark.parametrize("linear_block", [False, True])
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize("format", ["full", "int4"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen3"])
def test_a_step_has_the_bits_of_its_stages(
    name: str, format: KVFormat, int4: bool, linear_block: bool, tmp_path: Path
) -> None:
    decoder = a_decoder(name, tmp_path, torch.float32, int4, linear_block)
    assert 0 < sum(compared(decoder, format, [0, 1], THRESHOLDS["some"])) < ROWS - 2
    assert compared(decoder, format, [0, 1], THRESHOLDS["all leave"])[0] > 0
    assert compared(decoder, format, [0, 1], THRESHOLDS["none leaves"]) == [0, 0]
    assert compared(decoder, format, [1], THRESHOLDS["none asks"]) == [0]
    assert compared(decoder, format, [], THRESHOLDS["none asks"]) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_step_in_16_bits_has_the_bits_of_its_stages(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    decoder = a_decoder(name, tmp_path, dtype, False, False)
    for thresholds in THRESHOLDS.values():
        compared(decoder, "full", [0, 1], thresholds)
        compared(decoder, "int4", [1], thresholds)


def test_exits_may_read_another_form_of_the_output_matrix(tmp_path: Path) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, False)
    weight = torch.randn(decoder.spec.vocab_size, decoder.spec.hidden_size)
    decoder.let_exits_read(Int4Linear(quantize(weight, 8)))
    assert sum(compared(decoder, "full", [0, 1], THRESHOLDS["some"])) > 0


def test_what_the_kernels_do_not_take_has_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, False)
    exits = random_exits(decoder)
    whole = DecodePass.of(decoder, exits)
    assert whole is not None
    held = Sequences(decoder, rows=ROWS, max_tokens=40)
    monkeypatch.setattr(exeunt.kernels.decode_pass.native, "MOST_LOGITS", decoder.spec.vocab_size * 4)
    assert whole.takes(held.pages, 4)
    assert not whole.takes(held.pages, 5)
    monkeypatch.undo()

    class Other(type(decoder.output)):  # type: ignore[misc] # a matrix of another kind
        pass

    decoder.let_exits_read(Other(torch.randn(decoder.spec.vocab_size, decoder.spec.hidden_size)))
    assert DecodePass.of(decoder, exits) is None
    assert DecodePass.of(decoder, ()) is not None  # nothing asks them
    monkeypatch.setattr(Decoder, "native_blocks", None)
    assert DecodePass.of(decoder, ()) is None


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, False)
    exits = random_exits(decoder)
    held, batch, hidden = prepared(decoder, "full")
    whole = DecodePass.of(decoder, exits)
    assert whole is not None
    of_two_rows = replace(
        batch, query_starts=torch.tensor([0, 4, 9], dtype=torch.int32), page_tables=batch.page_tables[:2]
    )
    refused: list[tuple[str, dict[str, Any]]] = [
        ("8 tokens", {"hidden": hidden[:8]}),
        ("thresholds \\[8\\]", {"thresholds": THRESHOLDS["some"][:8]}),
        ("torch.float64", {"thresholds": THRESHOLDS["some"].double()}),
        ("2 rows", {"batch": of_two_rows}),
    ]
    for message, changed in refused:
        given = {"hidden": hidden, "batch": batch, "thresholds": THRESHOLDS["some"], **changed}
        with pytest.raises(ValueError, match=message):
            whole.run(given["hidden"], given["batch"], held.pages, [0], given["thresholds"])
    wide = replace(
        batch, page_tables=torch.cat([batch.page_tables] * 2, dim=1)[:, : batch.page_tables.shape[1]]
    )
    with pytest.raises(ValueError, match="not dense"):
        whole.run(hidden, wide, held.pages, [0], THRESHOLDS["some"])
    for asked in ([1, 0], [0, 0], [2], [-1]):
        with pytest.raises(ValueError, match="exits"):
            whole.run(hidden, batch, held.pages, asked, THRESHOLDS["some"])
    for depths, message in (((2, 2), "behind"), ((0, 2), "behind"), ((2, 99), "behind")):
        gates = tuple((depth, gate) for depth, (_, gate) in zip(depths, whole.native.exits, strict=True))
        with pytest.raises(ValueError, match=message):
            replace(whole.native, exits=gates)
    with pytest.raises(ValueError, match="a gate takes"):
        replace(whole.native, vocab=whole.native.vocab - 1)
    assert whole.native.head is not None
    with pytest.raises(ValueError, match="the head is"):
        replace(whole.native, exits=(), head=(whole.native.head[0][:-1], whole.native.head[1]))
