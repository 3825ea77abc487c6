"""Audits: what they say is true, what they count adds up, and nothing else changes by them."""

import inspect

import pytest
import torch
from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.compression.kv_format import KVPages, page_bytes_for
from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.server.answer import Answer
from exeunt.server.audit import Audit, AuditBook, AuditTotals, is_audited
from exeunt.server.auditor import Auditor
from exeunt.server.lifecycle import Lifecycle
from exeunt.server.metrics import Metrics, new_registry
from exeunt.server.request import ExitPolicy, StepEvent
from exeunt.server.sequence import Sequence
from exeunt.server.tick_batch import Part, geometry_of, integers
from tests.server.engine_bench import (
    BACKFILL,
    FULL,
    INT4_KV,
    LEAVE,
    LINEAR,
    PROMPT,
    VERIFIED,
    WAIT_S,
    Bench,
    Heard,
    running,
    score,
)

COUNTERS = ("audited_tokens", "audit_agreements", "audit_kl", "audit_nll_full", "audit_nll_exit")


def mixed(bench: Bench, exits: ExitPolicy, variant: Variant = FULL, new_tokens: int = 50) -> list[Heard]:
    asked = [
        bench.ask(
            prompt=PROMPT[i:] * (1 + i % 3),
            exits=exits,
            variant=variant,
            temperature=0.9 * (i % 2),
            seed=i,
            max_new_tokens=new_tokens,
        )
        for i in range(6)
    ]
    return [heard.wait() for heard in asked]


def test_what_rounding_makes_negative_adds_nothing() -> None:
    metrics = Metrics(new_registry(), "tiny", ["0"], [])
    book = AuditBook(metrics)
    # a counter would refuse to go down
    book.note(ExitPolicy("approximate"), Audit(3, True, kl=-1e-9, nll_full=-1e-9, nll_exit=-1e-9))
    assert book.totals == AuditTotals(audited_tokens=1, audit_agreements=1)


def spoken(answers: list[Heard]) -> list[list[tuple[int, float, str]]]:
    return [
        [(t.id, t.logprob, t.exit) for e in heard.events if isinstance(e, StepEvent) for t in e.tokens]
        for heard in answers
    ]


def counted(bench: Bench) -> AuditTotals:
    values = [bench.value(f"exeunt_{name}_total") for name in COUNTERS]
    return AuditTotals(int(values[0]), int(values[1]), *values[2:])


class Pages:
    """Keeps the bytes of every answer's pages when it ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: dict[str, list[Tensor]] = {}
        release = Lifecycle._release

        def watched(lives: Lifecycle, answer: Answer) -> None:
            sequence = answer.sequence
            pages = lives._runner._pages[sequence.variant]
            slots, size = sequence.table.slots(0, len(sequence.tokens) - 1), sequence.table.page_tokens
            self.held[sequence.name] = [
                torch.stack([part[slot // size, :, slot % size].clone() for slot in slots])
                for number in range(6)
                if not (sequence.variant.linear_block and number == 4)
                for block in [pages.block(number)]
                for part in (block.keys, block.values, block.key_params, block.value_params)
                if part is not None
            ]
            release(lives, answer)

        monkeypatch.setattr(Lifecycle, "_release", watched)


@pytest.mark.parametrize("variant", [FULL, INT4_KV, LINEAR], ids=str)
@pytest.mark.parametrize("exits", [LEAVE, BACKFILL], ids=lambda exits: exits.skipped_kv)
def test_neither_tokens_nor_pages_change_by_auditing(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, exits: ExitPolicy, variant: Variant
) -> None:
    """To the bit: the same seeds with no token audited and with all of them."""
    pages = Pages(monkeypatch)
    answers, held = [], []
    for share in (0.0, 1.0):
        with running(tiny_model, max_num_seqs=4, audit_share=share) as bench:
            answers.append(spoken(mixed(bench, exits, variant)))
            assert (counted(bench).audited_tokens > 50) == (share == 1.0)
        held.append(dict(pages.held))
        pages.held.clear()
    assert answers[0] == answers[1]
    assert held[0].keys() == held[1].keys()
    for name, before in held[0].items():
        for one, other in zip(before, held[1][name], strict=True):
            if exits is LEAVE:
                assert torch.equal(one, other)
            else:  # what is owed at the end was never written: the last owners of the page left it there
                assert torch.equal(one[: len(one) - 9], other[: len(other) - 9])


@pytest.mark.parametrize("run_through", [True, False])
@pytest.mark.parametrize("exits", [LEAVE, BACKFILL], ids=lambda exits: exits.skipped_kv)
def test_every_kind_of_sum_says_the_same(
    tiny_model: LoadedModel, exits: ExitPolicy, run_through: bool
) -> None:
    """Metrics, the engine's totals, the answers' totals, and the block calls that really happened."""
    calls, blocks = tiny_model.decoder(FULL).block_calls, tiny_model.spec.blocks
    with running(tiny_model, run_through=run_through, audit_share=1.0, max_num_seqs=4) as bench:
        before = sum(calls.tokens)
        answers = mixed(bench, exits)
        assert bench.engine.wait_idle(WAIT_S)
        ran = sum(calls.tokens) - before
        totals, metrics = bench.engine.audit_totals, counted(bench)
        wasted, passes = bench.value("exeunt_blocks_wasted_total"), bench.value("exeunt_block_passes_total")
    assert (totals.audited_tokens, totals.audit_agreements) == (
        metrics.audited_tokens,
        metrics.audit_agreements,
    )
    assert totals.audit_kl == pytest.approx(metrics.audit_kl)
    assert totals.audit_nll_full == pytest.approx(metrics.audit_nll_full)
    assert totals.audit_nll_exit == pytest.approx(metrics.audit_nll_exit)
    tokens = [t for heard in answers for e in heard.events if isinstance(e, StepEvent) for t in e.tokens]
    early = [t for t in tokens if t.exit != "final"]
    depth = [heard.finish.summary.depth for heard in answers]
    prompts = sum(len(PROMPT[i:] * (1 + i % 3)) - 1 for i in range(6)) * blocks
    assert ran == sum(d.blocks_executed + d.blocks_wasted for d in depth) + prompts
    assert wasted == sum(d.blocks_wasted for d in depth)
    assert passes == sum(d.block_passes for d in depth)
    assert sum(d.blocks_executed + d.blocks_skipped for d in depth) == len(tokens) * blocks
    if exits is LEAVE:
        assert totals.audited_tokens == len(early)
        assert wasted == sum(blocks - t.depth for t in early)
        assert passes == sum(d.blocks_executed + d.blocks_wasted for d in depth)
        assert totals.audit_nll_exit == pytest.approx(-sum(t.logprob for t in early), rel=1e-4)
    else:
        assert len(early) - 6 * 8 <= totals.audited_tokens <= len(early)  # some answers ended owing tokens
        assert wasted == 0
    assert 0 < totals.audit_agreements < totals.audited_tokens


def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Audit]]:
    found: list[tuple[str, Audit]] = []
    end = Auditor.end_tick

    def watched(*args: object) -> object:
        outcome = end(*args)  # type: ignore[arg-type]
        found.extend((row.sequence.name, audit) for row, audit in outcome.found)
        return outcome

    monkeypatch.setattr(Auditor, "end_tick", watched)
    return found


def full_logits(model: LoadedModel, tokens: list[int]) -> Tensor:
    """Logits [tokens, vocab] of a full-depth pass, without an engine."""
    from exeunt.server.pages import PagePool, PageTable
    from exeunt.server.row import Row

    size = page_bytes_for(model.spec, model.dtype)
    layout = model.kv_layout(FULL, size)
    count = -(-len(tokens) // layout.page_tokens)
    pages = KVPages(layout, torch.zeros(count * size, dtype=torch.uint8))
    table = PageTable(PagePool(count), layout.page_tokens)
    table.ensure(len(tokens))
    sequence = Sequence("reference", FULL, ExitPolicy(), tokens, len(tokens), table)
    positions = list(range(len(tokens)))
    geometry = geometry_of([Part(Row(sequence, positions, len(tokens)), positions)], model.device)
    decoder = model.decoder(FULL)
    with torch.inference_mode():
        hidden = decoder.embed(integers(tokens, model.device), geometry.positions)
        return decoder.head(decoder.run_blocks(hidden, geometry, pages, 0, model.spec.blocks))


def test_a_backfilled_tokens_audit_is_that_of_a_full_depth_pass(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = noted(monkeypatch)
    with running(tiny_model, audit_share=1.0) as bench:
        heard = bench.answer(exits=BACKFILL, temperature=1.0, seed=3, max_new_tokens=80)
    tokens = [t for e in heard.events if isinstance(e, StepEvent) for t in e.tokens]
    text = [*PROMPT, *(t.id for t in tokens)]
    logits = full_logits(tiny_model, text).double().log_softmax(-1)
    by_position = {audit.position: audit for _, audit in found}
    assert len(by_position) == len(found) > 20
    for position, audit in by_position.items():
        token = tokens[position + 1 - len(PROMPT)]
        assert token.exit != "final"
        assert audit.nll_full == pytest.approx(-logits[position, token.id].item(), abs=1e-4)
        assert audit.nll_exit == pytest.approx(-token.logprob, abs=1e-5)
        assert audit.kl >= -1e-6
    assert {audit.agreed for audit in by_position.values()} == {True, False}


def test_an_audit_agrees_when_both_heads_have_the_same_first_choice(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy tokens are the exit's first choice, so agreement can be read off the full-depth pass."""
    found = noted(monkeypatch)
    with running(tiny_model, audit_share=1.0) as bench:
        heard = bench.answer(exits=BACKFILL, max_new_tokens=80)
    text = [*PROMPT, *heard.ids()]
    top = full_logits(tiny_model, text).argmax(-1).tolist()
    assert len(found) > 20
    for _, audit in found:
        assert audit.agreed == (top[audit.position] == text[audit.position + 1])


def test_a_propagated_tokens_audit_is_the_pass_it_was_spared(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first early token of an answer follows exact keys and values, so its audit is that of a full-depth pass."""
    found = noted(monkeypatch)
    with running(tiny_model, audit_share=1.0, max_num_seqs=1) as bench:
        answers = mixed(bench, LEAVE)
    for number, heard in enumerate(answers):
        prompt = PROMPT[number:] * (1 + number % 3)
        text = [*prompt, *heard.ids()]
        first = next(i for i, name in enumerate(heard.exits()) if name != "final")
        logits = full_logits(tiny_model, text).log_softmax(-1)
        audits = [audit for name, audit in found if name == f"r{number + 1}/0"]
        assert [a.position for a in audits] == [
            len(prompt) - 1 + i for i, name in enumerate(heard.exits()) if name != "final"
        ]
        at = len(prompt) - 1 + first
        assert audits[0].position == at
        assert audits[0].nll_full == pytest.approx(-logits[at, text[at + 1]].item(), abs=1e-4)


def test_preempted_answers_are_audited_once_and_alike(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = noted(monkeypatch)
    for exits in (LEAVE, BACKFILL):
        with running(tiny_model, max_num_seqs=1, audit_share=1.0) as bench:
            mixed(bench, exits)
        alone = {(name, audit.position): audit for name, audit in found}
        assert len(alone) == len(found)
        found.clear()
        with running(
            tiny_model, pages=16, max_num_seqs=8, max_num_batched_tokens=24, audit_share=1.0
        ) as bench:
            mixed(bench, exits)
            assert bench.value("exeunt_preemptions_total") > 0
        squeezed = {(name, audit.position): audit for name, audit in found}
        assert len(squeezed) == len(found)
        found.clear()
        both = alone.keys() & squeezed.keys()
        assert len(both) > 0.8 * len(alone)
        if exits is LEAVE:
            assert alone.keys() == squeezed.keys()
        for key in both:
            assert alone[key].agreed == squeezed[key].agreed
            assert alone[key].nll_full == pytest.approx(squeezed[key].nll_full, abs=1e-4)


def test_the_share_is_kept_and_the_same_tokens_are_chosen_again(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {(n, p) for n in range(40) for p in range(1000) if is_audited(f"gen-{n}/0", p, 0.02)}
    assert 650 < len(chosen) < 950  # of 40,000: 800, with a standard deviation of 28
    more = {(n, p) for n in range(40) for p in range(1000) if is_audited(f"gen-{n}/0", p, 0.1)}
    assert chosen < more
    found = noted(monkeypatch)
    runs = []
    for seqs in (1, 6):
        with running(tiny_model, max_num_seqs=seqs, audit_share=0.3) as bench:
            mixed(bench, LEAVE)
        runs.append({(name, audit.position) for name, audit in found})
        found.clear()
    assert runs[0] == runs[1]
    assert all(is_audited(name, position, 0.3) for name, position in runs[0])


def test_drafts_and_scored_texts_are_not_audited(tiny_model: LoadedModel) -> None:
    with running(tiny_model, audit_share=1.0) as bench:
        bench.answer(exits=VERIFIED, max_new_tokens=30)
        assert any(t.exit != "final" for t in score(bench, PROMPT, LEAVE))
        assert counted(bench) == AuditTotals()


def test_cancelled_answers_leave_no_logits_behind(tiny_model: LoadedModel) -> None:
    with running(
        tiny_model, audit_share=1.0, max_num_seqs=4
    ) as bench:  # checks that nothing is held at its end
        asked = [bench.ask(exits=BACKFILL, max_new_tokens=400) for _ in range(8)]
        while not asked[0].ids():
            pass
        for number in range(1, 9, 2):
            bench.engine.cancel(f"r{number}")
        for heard in asked:
            heard.wait()


@pytest.mark.parametrize("where", ["_look_deeper", "arrive"])
def test_a_failing_audit_costs_no_answer(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """No memory for the second opinion: the answers are as without audits, and so is what is kept afterwards."""
    exits = LEAVE if where == "_look_deeper" else BACKFILL
    with running(tiny_model, max_num_seqs=4) as bench:
        plain = spoken(mixed(bench, exits))
    decoder = type(tiny_model.decoder(FULL))
    head = decoder.head

    def fails(self: Decoder, hidden: Tensor) -> Tensor:
        frames = {frame.function for frame in inspect.stack(0)}
        if where in frames:
            raise MemoryError("no room for a second opinion")
        return head(self, hidden)

    monkeypatch.setattr(decoder, "head", fails)
    with running(tiny_model, max_num_seqs=4, audit_share=1.0) as bench:
        assert spoken(mixed(bench, exits)) == plain
        assert counted(bench).audited_tokens == 0
    assert "audits are given up" in caplog.text


def test_an_audit_that_fails_halfway_tells_nothing(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comparisons of the tick that were ready are dropped with the rest: what is told of is whole ticks."""
    auditor = Auditor(1.0, tiny_model.device)
    with auditor._aside():
        auditor._comparisons.append(None)  # type: ignore[arg-type]
        raise MemoryError
    assert auditor._comparisons == []
    assert auditor.end_tick(lambda *_: None).found == []
