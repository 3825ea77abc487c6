"""Backfilled keys and values are exactly those of a full-depth pass, whenever they were caught up."""

import random

import pytest
import torch
from torch import Tensor

from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.server.answer import Answer
from exeunt.server.block_account import BlockAccount
from exeunt.server.lifecycle import Lifecycle
from exeunt.server.pages import PagePool, PageTable
from exeunt.server.request import DepthTotals, ExitPolicy, StepEvent
from exeunt.server.sequence import Sequence, Status
from tests.server.engine_bench import (
    BACKFILL,
    FULL,
    INT4_KV,
    LINEAR,
    OFF,
    PROMPT,
    VERIFIED,
    WAIT_S,
    Bench,
    running,
    score,
)
from tests.server.fixed_drafter import FixedDrafter


class Pages:
    """Keeps what every sequence's pages hold when it ends, and what of it was still owed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: list[tuple[list[int], list[dict[str, Tensor]], dict[int, list[int]]]] = []
        release = Lifecycle._release

        def watched(lives: Lifecycle, answer: Answer) -> None:
            sequence = answer.sequence
            pages = lives._runner._pages[sequence.variant]
            blocks = [b for b in range(6) if not (sequence.variant.linear_block and b == 4)]
            slots = sequence.table.slots(0, len(sequence.tokens) - 1)
            size = sequence.table.page_tokens
            held = []
            for b in blocks:
                block = pages.block(b)
                parts = {"keys": block.keys, "values": block.values}
                if block.key_params is not None and block.value_params is not None:
                    parts |= {"key_params": block.key_params, "value_params": block.value_params}
                held.append(
                    {
                        name: torch.stack([part[slot // size, :, slot % size].clone() for slot in slots])
                        for name, part in parts.items()
                    }
                )
            owed = {stage: list(positions) for stage, positions in sequence.pending.items()}
            self.held.append((list(sequence.tokens), held, owed))
            release(lives, answer)

        monkeypatch.setattr(Lifecycle, "_release", watched)


@pytest.mark.parametrize("run_through", [True, False])
@pytest.mark.parametrize("variant", [FULL, INT4_KV, LINEAR], ids=str)
@pytest.mark.parametrize("exits", [BACKFILL, VERIFIED], ids=lambda exits: exits.mode)
def test_pages_equal_those_of_a_full_depth_pass(
    tiny_model: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    exits: ExitPolicy,
    variant: Variant,
    run_through: bool,
) -> None:
    pages = Pages(monkeypatch)
    with running(
        tiny_model, run_through=run_through, new_drafter=lambda _: FixedDrafter(0.0, 3), max_num_seqs=4
    ) as bench:
        asked = [
            bench.ask(prompt=PROMPT[i:], variant=variant, exits=exits, max_new_tokens=n, seed=i)
            for i, n in enumerate((40, 41, 42, 43))
        ]
        depth = [heard.wait().finish.summary.depth for heard in asked]
    if exits is VERIFIED:
        assert sum(d.drafts for d in depth) > sum(d.drafts_accepted for d in depth)
    else:
        assert all(len(d.by_exit) > 1 for d in depth)
    caught_up = list(pages.held)
    pages.held.clear()
    with running(tiny_model, max_num_batched_tokens=1000) as bench:
        for tokens, _, _ in caught_up:
            bench.answer(prompt=tuple(tokens), variant=variant, max_new_tokens=1)
    stops = {1: 2, 2: 4}  # blocks that a position in front of stage 1 or 2 has passed
    compared = owed_count = 0
    for (tokens, early, owed), (again, full, _) in zip(caught_up, pages.held, strict=True):
        assert again[: len(tokens)] == tokens
        reach = {position: stops[stage] for stage, positions in owed.items() for position in positions}
        owed_count += len(reach)
        # the last drafts of the verified mode are no part of the text
        for index, (block, reference) in enumerate(zip(early, full, strict=True)):
            number = index + (variant.linear_block and index >= 4)
            known = [p for p in range(len(tokens) - 1) if reach.get(p, 6) > number]
            for name, held in block.items():
                assert torch.equal(held[known], reference[name][: len(tokens) - 1][known])
                compared += len(known)
    assert compared > 0
    if exits is BACKFILL:
        assert owed_count > 0, "no answer ended with tokens that owed their keys and values"


def test_at_most_so_many_tokens_owe_and_the_totals_add_up(tiny_model: LoadedModel) -> None:
    """Early tokens cost their blocks in the end, but for those that the answer ended with."""
    calls, blocks = tiny_model.decoder(FULL).block_calls, tiny_model.spec.blocks
    always = ExitPolicy("approximate", threshold=0.0, skipped_kv="backfill")
    with running(tiny_model) as bench:
        before = sum(calls.tokens)
        heard = bench.answer(exits=always, max_new_tokens=60)
        assert bench.engine.wait_idle(WAIT_S)
        ran = sum(calls.tokens) - before
        counted = {
            name: bench.value(f"exeunt_blocks_{name}_total") for name in ("executed", "skipped", "wasted")
        }
        passes = bench.value("exeunt_block_passes_total")
    depth = heard.finish.summary.depth
    assert depth.by_exit == {"block_1": 59, "final": 1}
    assert depth.blocks_executed + depth.blocks_skipped == 60 * blocks
    assert 0 < depth.blocks_skipped <= 9 * (blocks - 2)
    assert depth.blocks_wasted == 0
    assert ran == depth.blocks_executed + (len(PROMPT) - 1) * blocks
    assert counted == {"executed": depth.blocks_executed, "skipped": depth.blocks_skipped, "wasted": 0}
    assert passes == depth.block_passes < 60 * blocks / 2


@pytest.mark.parametrize("run_through", [True, False])
def test_scoring_with_backfill_reads_exits_over_exact_keys(
    tiny_model: LoadedModel, run_through: bool
) -> None:
    """What leaves early changes nothing behind it: every token left to the end scores as with exits off."""
    dice = random.Random(2)
    text = tuple(dice.randrange(256) for _ in range(120))
    with running(tiny_model, run_through=run_through, max_num_batched_tokens=50, max_num_seqs=4) as bench:
        plain = score(bench, text, OFF)
        backfilled = score(bench, text, BACKFILL)
        propagated = score(bench, text, ExitPolicy("approximate", threshold=0.5))
    assert [t.id for t in backfilled] == list(text)
    final = [i for i, t in enumerate(backfilled) if t.exit == "final"]
    assert 10 < len(final) < 110
    assert [backfilled[i].logprob for i in final] == [plain[i].logprob for i in final]
    assert any(backfilled[i].logprob != propagated[i].logprob for i in final)


@pytest.mark.parametrize("run_through", [True, False])
def test_backfilled_answers_repeat_when_scored(tiny_model: LoadedModel, run_through: bool) -> None:
    with running(tiny_model, run_through=run_through) as bench:
        start = next(t for t in range(256) if score(bench, (t, 0), BACKFILL)[1].exit == "final")
        heard = bench.answer(prompt=(start,), exits=BACKFILL, max_new_tokens=60)
        tokens = [t for e in heard.events if isinstance(e, StepEvent) for t in e.tokens]
        scored = score(bench, (start, *heard.ids()), BACKFILL)
    assert len({t.exit for t in tokens}) > 1
    assert [t.exit for t in scored[1:]] == [t.exit for t in tokens]
    assert [t.logprob for t in scored[1:]] == pytest.approx([t.logprob for t in tokens], abs=1e-4)


def mixed(bench: Bench) -> list[tuple[list[int], list[str], int]]:
    """The tokens of some answers, where they left, and how many blocks of theirs never ran."""
    asked = [
        bench.ask(
            prompt=PROMPT[i % 7 :] * (1 + i % 3), exits=BACKFILL, temperature=0.8, seed=i, max_new_tokens=60
        )
        for i in range(6)
    ]
    return [
        (heard.ids(), heard.exits(), heard.finish.summary.depth.blocks_skipped)
        for heard in (one.wait() for one in asked)
    ]


class Work:
    """The pairs that metrics heard of."""

    def __init__(self) -> None:
        self.executed = self.skipped = self.wasted = 0

    def work(self, *, executed: int = 0, skipped: int = 0, wasted: int = 0, passes: int = 0) -> None:
        self.executed, self.skipped = self.executed + executed, self.skipped + skipped
        self.wasted += wasted

    def drafts(self, proposed: int, accepted: int) -> None:
        raise AssertionError


def test_what_an_answer_owed_counts_once_it_has_run_and_no_earlier() -> None:
    def preempted() -> tuple[Sequence, BlockAccount, Work]:
        totals, work = DepthTotals(blocks=4), Work()
        sequence = Sequence("a", FULL, BACKFILL, list(range(8)), 3, PageTable(PagePool(4), 16), totals=totals)
        account = BlockAccount(totals, work)
        for blocks in (4, 4, 4, 2, 2):  # of five tokens the last two left half-way
            account.ran(sequence, blocks, blocks, stop=3, ended=True)
        sequence.left_at, sequence.preemptions, sequence.status = [1, 1, 1, 0, 0], 1, Status.RUNNING
        return sequence, account, work

    sequence, account, work = preempted()
    account.ran(sequence, 12, 4, stop=5, ended=True)  # the first of two chunks: what it runs had all been run
    account.close(sequence.generated)
    assert (work.executed, work.skipped, work.wasted) == (16, 4, 12)
    sequence, account, work = preempted()
    account.ran(sequence, 12, 4, stop=5, ended=True)
    account.ran(sequence, 8, 4, stop=7, ended=False)
    assert (work.executed, work.wasted) == (16, 0)
    account.ran(sequence, 0, 0, stop=7, ended=True)
    account.close(sequence.generated)
    assert (work.executed, work.skipped, work.wasted) == (20, 0, 16)


@pytest.mark.parametrize("run_through", [True, False])
def test_preempted_answers_catch_up_by_a_full_depth_pass(tiny_model: LoadedModel, run_through: bool) -> None:
    with running(tiny_model, max_num_seqs=1) as bench:
        alone = mixed(bench)
    with running(
        tiny_model, pages=16, max_num_seqs=8, max_num_batched_tokens=24, run_through=run_through
    ) as bench:
        squeezed = mixed(bench)
        assert bench.value("exeunt_preemptions_total") > 0
    assert squeezed == alone  # what an answer owed when it was preempted has run since: it is not skipped
    assert any(skipped for _, _, skipped in alone)
