"""What a sequence yields, on a tiny real model: it must not depend on anything around it."""

import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.server import row_sampling
from exeunt.server.request import (
    ExitPolicy,
    FailureEvent,
    FinishReason,
    StepEvent,
)
from exeunt.server.sampling import StartedDraws, start_each
from exeunt.server.sequence import Sequence
from tests.server.engine_bench import (
    BACKFILL,
    FULL,
    INT4_KV,
    LEAVE,
    LINEAR,
    OFF,
    PROMPT,
    VERIFIED,
    Bench,
    Heard,
    running,
    score,
)


def test_greedy_tokens_are_those_of_transformers(tiny_model: LoadedModel, tiny_checkpoint: Path) -> None:
    reference = LlamaForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    reference.generation_config.eos_token_id = None
    ids = torch.tensor([PROMPT])
    expected = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=40,
        do_sample=False,
        pad_token_id=0,
    )[0, len(PROMPT) :].tolist()
    with running(tiny_model, max_num_batched_tokens=7, max_num_seqs=4) as bench:
        heard = bench.answer(max_new_tokens=40)
    assert heard.ids() == expected
    summary = heard.finish.summary
    assert summary.finish_reason is FinishReason.LENGTH
    assert summary.depth.by_exit == {"final": 40}


def crowd(bench: Bench) -> list[Heard]:
    """A mix of everything: variants, exit modes, temperatures, lengths."""
    dice = random.Random(5)
    asked = []
    with bench.held():
        for i in range(14):
            prompt = tuple(dice.randrange(256) for _ in range(dice.choice((1, 3, 17, 60, 130))))
            asked.append(
                bench.ask(
                    prompt=prompt,
                    variant=dice.choice((FULL, INT4_KV, LINEAR)),
                    exits=dice.choice((OFF, LEAVE, BACKFILL, VERIFIED)),
                    temperature=dice.choice((0.0, 0.8, 1.3)),
                    top_p=dice.choice((1.0, 0.9)),
                    top_k=dice.choice((0, 20)),
                    repetition_penalty=dice.choice((1.0, 1.2)),
                    seed=i,
                    max_new_tokens=dice.choice((5, 60, 90)),
                )
            )
    return asked


def test_tokens_do_not_depend_on_the_crowd_on_chunks_or_on_preemption(tiny_model: LoadedModel) -> None:
    with running(tiny_model, max_num_seqs=1) as bench:  # each alone
        alone = [heard.wait() for heard in crowd(bench)]
    with running(tiny_model, max_num_seqs=16, max_num_batched_tokens=512) as bench:
        together = [heard.wait() for heard in crowd(bench)]
    with running(tiny_model, max_num_seqs=8, max_num_batched_tokens=9) as bench:
        chunked = [heard.wait() for heard in crowd(bench)]
    with running(tiny_model, pages=14, max_num_seqs=8, max_num_batched_tokens=64) as bench:
        squeezed = [heard.wait() for heard in crowd(bench)]
        assert bench.value("exeunt_preemptions_total") > 0
    with running(tiny_model, run_through=False, max_num_seqs=8, max_num_batched_tokens=64) as bench:
        waiting_at_exits = [heard.wait() for heard in crowd(bench)]
    assert any(name != "final" for heard in alone for name in heard.exits())
    for other in (together, chunked, squeezed, waiting_at_exits):
        assert [heard.ids() for heard in other] == [heard.ids() for heard in alone]
        assert [exits_of(heard) for heard in other] == [exits_of(heard) for heard in alone]


def exits_of(heard: Heard) -> list[str]:
    """Where the tokens left; nothing for the verified mode, which drafts as it pays at the moment."""
    return [] if heard.mode == "verified" else heard.exits()


def long_prompts(bench: Bench, variant: Variant) -> list[Heard]:
    prompts = [tuple((7 * i + j * j) % 256 for j in range(40)) for i in range(5)]
    with bench.held():
        asked = [
            bench.ask(prompt=p, variant=variant, exits=LEAVE, max_new_tokens=90, temperature=0.7, seed=i)
            for i, p in enumerate(prompts)
        ]
    return [heard.wait() for heard in asked]


@pytest.mark.parametrize("run_through", [True, False])
@pytest.mark.parametrize("variant", [FULL, INT4_KV, LINEAR], ids=str)
def test_a_preempted_answer_replays_its_exits(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, variant: Variant, run_through: bool
) -> None:
    """Prompts long enough to be replayed in chunks, exits on record, and the blocks run again are counted as wasted."""
    with running(tiny_model, max_num_seqs=1) as bench:
        alone = long_prompts(bench, variant)
    replayed: list[int] = []
    drop = Sequence.drop_computed

    def watched(sequence: Sequence) -> None:
        replayed.append(sum(stage < 2 for stage in sequence.left_at))
        drop(sequence)

    monkeypatch.setattr(Sequence, "drop_computed", watched)
    tokens_per_page = {FULL: 16, LINEAR: 16}.get(variant, 64)
    pages = 240 // tokens_per_page + 2
    calls = tiny_model.decoder(variant).block_calls
    before = sum(calls.tokens)
    with running(
        tiny_model, pages=pages, run_through=run_through, max_num_batched_tokens=24, max_num_seqs=8
    ) as bench:
        squeezed = long_prompts(bench, variant)
        wasted = bench.value("exeunt_blocks_wasted_total")
    assert sum(replayed) > 0, "nobody with an early exit on record was preempted"
    assert [heard.ids() for heard in squeezed] == [heard.ids() for heard in alone]
    assert [heard.exits() for heard in squeezed] == [heard.exits() for heard in alone]
    depth = [heard.finish.summary.depth for heard in squeezed]
    assert wasted == sum(d.blocks_wasted for d in depth) > 0
    counted = sum(d.blocks_executed + d.blocks_wasted for d in depth)
    prompt_work = sum(calls.tokens) - before - counted
    assert prompt_work % tiny_model.spec.blocks == 0  # what is left is whole passes over prompt tokens
    assert prompt_work // tiny_model.spec.blocks >= 5 * 39


def test_score_is_the_teacher_forced_logprob(tiny_model: LoadedModel, tiny_checkpoint: Path) -> None:
    reference = LlamaForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    text = PROMPT * 5
    with torch.inference_mode():
        logits = reference(torch.tensor([text])).logits[0].log_softmax(-1)
    expected = [logits[i, text[i + 1]].item() for i in range(len(text) - 1)]
    with running(tiny_model, max_num_batched_tokens=50, max_num_seqs=2) as bench:
        scored = score(bench, text, OFF)
    assert scored[0].logprob is None
    assert [t.logprob for t in scored[1:]] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("exits", [OFF, VERIFIED], ids=lambda exits: exits.mode)
def test_each_draw_knows_its_place_and_all_tokens_before_it(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, exits: ExitPolicy
) -> None:
    drawn: set[tuple[int, frozenset[int]]] = set()

    def started(logits: torch.Tensor, rows: list[row_sampling.RowSampling], *rest: Any) -> StartedDraws:
        drawn.update((row.position, frozenset(map(int, row.history))) for row in rows)
        return start_each(logits, rows, *rest)

    monkeypatch.setattr("exeunt.server.runner.start_each", started)
    with running(tiny_model) as bench:
        ids = bench.answer(max_new_tokens=20, repetition_penalty=1.5, exits=exits).ids()
    known = {(place, frozenset((*PROMPT, *ids[:place]))) for place in range(20)}
    assert drawn == known if exits is OFF else drawn >= known  # behind drafts that were wrong, others too


def test_scoring_a_generated_text_repeats_its_exits_and_logprobs(tiny_model: LoadedModel) -> None:
    with running(tiny_model) as bench:
        # generation never lets a prompt's token leave, scoring does: begin with one token whose pass stays anyway
        start = next(t for t in range(256) if score(bench, (t, 0), LEAVE)[1].exit == "final")
        heard = bench.answer(prompt=(start,), exits=LEAVE, max_new_tokens=60)
        tokens = [t for e in heard.events if isinstance(e, StepEvent) for t in e.tokens]
        scored = score(bench, (start, *heard.ids()), LEAVE)
    assert len({t.exit for t in tokens}) > 1
    assert [t.exit for t in scored[1:]] == [t.exit for t in tokens]
    assert [t.logprob for t in scored[1:]] == pytest.approx([t.logprob for t in tokens], abs=1e-4)


def test_choices_differ_and_a_seed_repeats_them(tiny_model: LoadedModel) -> None:
    with running(tiny_model) as bench:
        one = bench.answer(n=3, temperature=1.0, seed=11)
        two = bench.answer(n=3, temperature=1.0, seed=11)
    answers = [one.ids(choice) for choice in range(3)]
    assert len({tuple(a) for a in answers}) == 3
    assert answers == [two.ids(choice) for choice in range(3)]


@pytest.mark.parametrize("penalty", [1.0, 1.2])  # which the pass's own draws do not know
@pytest.mark.parametrize("exits", [OFF, LEAVE, VERIFIED], ids=lambda exits: exits.mode)
def test_one_rows_nan_is_no_other_rows_trouble(
    tiny_model: LoadedModel, exits: ExitPolicy, penalty: float
) -> None:
    embedded, spoilt = tiny_model.decoder(FULL).embedding.tokens, (*PROMPT[:9], 7, *PROMPT[9:])
    with running(tiny_model, max_num_seqs=4) as bench:
        ask = partial(bench.ask, exits=exits, repetition_penalty=penalty, max_new_tokens=30)
        clean, other = ask().wait().ids(), ask(prompt=spoilt).wait().ids()
        assert 7 not in clean
        kept = embedded[7].clone()
        embedded[7] = math.nan
        try:
            with bench.held():
                asked = [ask(), ask(prompt=spoilt), ask()]
            first, failed, last = [heard.wait() for heard in asked]
        finally:
            embedded[7] = kept
        failure = failed.events[-1]
        assert isinstance(failure, FailureEvent)
        assert failure.error_id
        assert failed.ids() == []
        assert first.ids() == last.ids() == clean
        assert ask(prompt=spoilt).wait().ids() == other


@pytest.mark.parametrize("exits", [OFF, VERIFIED], ids=lambda exits: exits.mode)
def test_an_exception_in_one_rows_sampling_fails_that_request_alone(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, exits: ExitPolicy
) -> None:
    row_key = row_sampling._row_key

    def raises(row: row_sampling.RowSampling) -> tuple[int, int]:
        if row.params.seed == 1 and row.position > 4:
            raise OverflowError("a bug")
        return row_key(row)

    with running(tiny_model) as bench:
        clean = [bench.answer(max_new_tokens=30, temperature=0.9, seed=seed).ids() for seed in range(3)]
    monkeypatch.setattr(row_sampling, "_row_key", raises)
    with running(tiny_model, max_num_seqs=4) as bench:
        with bench.held():
            asked = [
                bench.ask(exits=exits, max_new_tokens=30, temperature=0.9, seed=seed) for seed in range(3)
            ]
        failure = asked[1].wait().events[-1]
        assert isinstance(failure, FailureEvent)
        assert asked[1].ids() == clean[1][:5]
        for number in (0, 2):
            assert asked[number].wait().ids() == clean[number]
