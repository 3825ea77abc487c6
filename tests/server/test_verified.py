"""Verified exits equal exits off, whatever is drafted, whoever is beside, however the work is cut."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.server.answer import Answer
from exeunt.server.drafting import LOOKUP, Drafter, Proposal
from exeunt.server.lifecycle import Lifecycle
from exeunt.server.request import ExitPolicy, GenerationRequest, StepEvent
from exeunt.server.runner import Runner
from exeunt.server.tick import Tick
from exeunt.server.verification import Draw, confirmed_draws
from tests.server.engine_bench import (
    BACKFILL,
    FULL,
    INT4_KV,
    LEAVE,
    LINEAR,
    OFF,
    PROMPT,
    VERIFIED,
    WAIT_S,
    Begun,
    Bench,
    Heard,
    go_by_stages,
    running,
)
from tests.server.fixed_drafter import FixedDrafter


class WildDrafter:
    """Drafts at random: from an exit however unsure, looked up, right or wrong, or not at all.

    `text` is prompt and answer as the full model has them, so that many of its guesses are right.
    """

    def __init__(self, seed: int, text: Sequence[int] = ()) -> None:
        self._dice, self._text = random.Random(seed), text
        self.proposed = self.accepted = 0

    def propose(self, tokens: Sequence[int], drafted: int, room: int) -> Proposal:
        what = self._dice.random()
        if what < 0.25:
            return Proposal()
        if what < 0.6:
            return Proposal(threshold=self._dice.choice((0.0, 0.3, 0.6)))
        start = len(tokens)
        return Proposal(tuple(self._guess(start + i) for i in range(self._dice.randint(1, min(room, 5)))))

    def _guess(self, place: int) -> int:
        if place < len(self._text) and self._dice.random() < 0.8:
            return self._text[place]
        return self._dice.choice((256, self._dice.randrange(256)))  # 256 ends a text

    def settled(self, stages: Sequence[int], accepted: int) -> None:
        self.proposed += len(stages)
        self.accepted += accepted

    def at_stake(self, tokens: Sequence[int], drafted: int, rows: int) -> float:
        return math.inf if len(tokens) % 16 < 8 else 0.0


class Oracle:
    """Drafts what the full model will say, but every few tokens, so that most drafts are confirmed."""

    def __init__(self, text: Sequence[int], wrong_every: int) -> None:
        self._text, self._wrong_every = list(text), wrong_every

    def propose(self, tokens: Sequence[int], drafted: int, room: int) -> Proposal:
        at = len(tokens)
        drafts = self._text[at : at + min(room, 3)]
        return Proposal(
            tokens=tuple(
                (t + 1) % 256 if (at + i) % self._wrong_every == 0 else t for i, t in enumerate(drafts)
            )
        )

    def settled(self, stages: Sequence[int], accepted: int) -> None:
        pass

    def at_stake(self, tokens: Sequence[int], drafted: int, rows: int) -> float:
        return math.inf


def ask(bench: Bench, exits: ExitPolicy, seed: int) -> list[Heard]:
    """A mix of variants, prompts and ways to sample; the same for the same seed but for the exits."""
    dice, asked = random.Random(seed), []
    for i in range(8):
        prompt = tuple(dice.randrange(256) for _ in range(dice.choice((1, 5, 40, 90))))
        asked.append(
            bench.ask(
                prompt=prompt,
                variant=dice.choice((FULL, INT4_KV, LINEAR)),
                exits=exits,
                temperature=dice.choice((0.0, 0.7, 1.2)),
                top_p=dice.choice((1.0, 0.9)),
                top_k=dice.choice((0, 10)),
                repetition_penalty=dice.choice((1.0, 1.3)),
                min_new_tokens=dice.choice((0, 6)),
                ignore_eos=dice.random() < 0.5,
                seed=seed + i,
                max_new_tokens=dice.choice((1, 2, 7, 40)),
            )
        )
    return asked


def told(heard: Heard) -> tuple[list[int], str, str, list[float]]:
    """All that a caller learns of an answer but where its tokens were proposed."""
    tokens = [t for e in heard.events if isinstance(e, StepEvent) for t in e.tokens]
    return heard.ids(), heard.text(), heard.finish.summary.finish_reason, [t.logprob for t in tokens]


def wild(
    drafters: list[WildDrafter], seed: int, texts: Sequence[Sequence[int]] = ()
) -> Callable[[GenerationRequest], Drafter]:
    """Wild drafters, each with the one of `texts` that begins with its prompt."""

    def new(request: GenerationRequest) -> Drafter:
        prompt = request.prompt_token_ids
        text = next((t for t in texts if tuple(t[: len(prompt)]) == prompt), ())
        drafters.append(WildDrafter(seed + len(drafters), text))
        return drafters[-1]

    return new


def check(model: LoadedModel, seed: int, run_through: bool, pages: int, budget: int) -> tuple[int, int]:
    """Ask for answers with exits off, one by one, and then verified, in a crowd; return drafts proposed and right."""
    with running(model, max_num_seqs=1) as bench:
        plain = [heard.wait() for heard in ask(bench, OFF, seed)]
    texts = [[*heard.prompt, *heard.ids()] for heard in plain]
    drafters: list[WildDrafter] = []
    new_drafter = wild(drafters, seed, texts)
    with running(
        model, pages, run_through, new_drafter, max_num_seqs=8, max_num_batched_tokens=budget
    ) as bench:
        others = [bench.ask(exits=dice, seed=seed) for dice in (LEAVE, BACKFILL, OFF)]
        heard = [one.wait() for one in ask(bench, VERIFIED, seed)]
        for other in others:
            other.wait()
    assert [told(one) for one in heard] == [told(one) for one in plain]
    return sum(d.proposed for d in drafters), sum(d.accepted for d in drafters)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10_000),
    run_through=st.booleans(),
    pages=st.sampled_from((18, 400)),
    budget=st.sampled_from((8, 24, 128)),
)
def test_verified_is_exits_off_token_for_token(
    tiny_model: LoadedModel, seed: int, run_through: bool, pages: int, budget: int
) -> None:
    check(tiny_model, seed, run_through, pages, budget)


@pytest.mark.parametrize("run_through", [True, False])
def test_drafts_that_were_right_and_wrong_both_occur(tiny_model: LoadedModel, run_through: bool) -> None:
    counts = [check(tiny_model, seed, run_through, 18, 24) for seed in range(3)]
    assert sum(proposed for proposed, _ in counts) > 1.2 * sum(accepted for _, accepted in counts) > 50


@pytest.mark.parametrize("variant", [FULL, INT4_KV, LINEAR], ids=str)
@pytest.mark.parametrize("wrong_every", [1, 3, 10_000])
def test_right_and_wrong_drafts_are_counted_and_change_nothing(
    tiny_model: LoadedModel, variant: Variant, wrong_every: int
) -> None:
    with running(tiny_model) as bench:
        plain = bench.answer(variant=variant, temperature=0.9, seed=3, max_new_tokens=50)
    text = [*PROMPT, *plain.ids()]
    with running(tiny_model, new_drafter=lambda _: Oracle(text, wrong_every)) as bench:
        drafted = bench.answer(variant=variant, exits=VERIFIED, temperature=0.9, seed=3, max_new_tokens=50)
        depth = drafted.finish.summary.depth
        assert bench.value("exeunt_drafts_total") == depth.drafts
        assert bench.value("exeunt_drafts_accepted_total") == depth.drafts_accepted
    assert told(drafted) == told(plain)
    assert depth.drafts > 0
    assert (depth.drafts_accepted > 0) == (wrong_every > 1)
    assert (depth.drafts_accepted < depth.drafts) == (wrong_every < 100)
    assert depth.by_exit.get("lookup", 0) == depth.drafts_accepted
    blocks = tiny_model.spec.blocks
    assert depth.blocks_executed == 50 * blocks
    assert depth.blocks_skipped == 0
    assert depth.blocks_wasted == (depth.drafts - depth.drafts_accepted) * blocks
    if wrong_every > 100:
        assert depth.block_passes < 50 * blocks / 3


def test_an_exit_drafts_and_full_depth_confirms(tiny_model: LoadedModel) -> None:
    """The totals are the block calls that happened, and confirmed drafts name their exit."""
    calls = tiny_model.decoder(FULL).block_calls
    with running(tiny_model, new_drafter=lambda _: FixedDrafter(0.0, 3)) as bench:
        before = sum(calls.tokens)
        heard = bench.answer(exits=VERIFIED, temperature=1.0, seed=5, max_new_tokens=200)
        ran = sum(calls.tokens) - before
    depth, blocks = heard.finish.summary.depth, tiny_model.spec.blocks
    assert depth.drafts > depth.drafts_accepted > 0
    assert depth.by_exit["block_1"] == depth.drafts_accepted
    assert depth.blocks_executed == 200 * blocks
    prompt = (len(PROMPT) - 1) * blocks
    assert ran == depth.blocks_executed + depth.blocks_wasted + prompt


def test_stop_strings_and_the_end_of_text_count_only_when_confirmed(tiny_model: LoadedModel) -> None:
    with running(tiny_model) as bench:
        plain = bench.answer(max_new_tokens=40)
    text = plain.text()
    stop = next(text[i : i + 2] for i in range(9, 30) if text.find(text[i : i + 2]) == i)
    with running(tiny_model) as bench:
        expected = told(bench.answer(max_new_tokens=40, stop=(stop,)))
    for seed in range(6):
        with running(tiny_model, new_drafter=lambda _, s=seed: WildDrafter(s)) as bench:  # type: ignore[misc]
            assert told(bench.answer(exits=VERIFIED, max_new_tokens=40, stop=(stop,))) == expected


@pytest.mark.parametrize("pages", [18, 400])
@pytest.mark.parametrize("at_once", [1, 3])
def test_steps_that_draft_nothing_are_begun_ahead_between_others(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, at_once: int, pages: int
) -> None:
    """As beside CUDA graphs, with drafters that rest now and then."""

    def answers(bench: Bench, exits: ExitPolicy) -> list[Heard]:
        kinds: list[dict[str, Any]] = [
            {},
            {"temperature": 1.0},
            {"temperature": 1.2, "top_p": 0.9, "ignore_eos": False},
        ]
        with bench.held():
            asked = [
                bench.ask(prompt=PROMPT[i:], exits=exits, seed=i, max_new_tokens=40 - i, **kind)
                for i, kind in enumerate(kinds * 2)
            ]
        return [one.wait() for one in asked]

    with running(tiny_model, max_num_seqs=1) as bench:
        plain = answers(bench, OFF)
    monkeypatch.setattr(Runner, "has_graphs", property(lambda _: True))
    go_by_stages(monkeypatch)
    begun, drafters = Begun(monkeypatch), list[WildDrafter]()
    new_drafter = wild(drafters, 5, [[*heard.prompt, *heard.ids()] for heard in plain])
    with running(tiny_model, pages, True, new_drafter, max_num_seqs=at_once) as bench:
        heard = answers(bench, VERIFIED)
        assert bench.engine.wait_idle(WAIT_S)
        assert bench.engine._lives.holds_nothing
    assert [told(one) for one in heard] == [told(one) for one in plain]
    assert sum(d.proposed for d in drafters) > sum(d.accepted for d in drafters) > 0
    assert begun.drafting > 10
    assert max(begun.rows) == at_once


def test_random_cancellations_of_drafting_answers_leave_nothing_behind(tiny_model: LoadedModel) -> None:
    dice = random.Random(4)
    drafters: list[WildDrafter] = []
    with running(
        tiny_model, 20, bool(dice.randrange(2)), wild(drafters, 1), max_num_seqs=6, max_num_batched_tokens=40
    ) as bench:
        asked = []
        for i in range(40):
            prompt = tuple(dice.randrange(256) for _ in range(dice.choice((1, 20, 60))))
            exits = dice.choice((VERIFIED, BACKFILL, LEAVE))
            asked.append(bench.ask(prompt=prompt, variant=dice.choice((FULL, INT4_KV)), exits=exits, seed=i))
            if dice.random() < 0.5:
                bench.engine.cancel(f"r{dice.randint(1, i + 1)}")
        for heard in asked:
            heard.wait()


@pytest.mark.parametrize("run_through", [True, False])
@pytest.mark.parametrize("drafting", [0, 1])
def test_a_drafted_end_of_text_is_confirmed_before_anything_follows(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, run_through: bool, drafting: int
) -> None:
    """Texts may end at many tokens, so that exits often draft an end, right or wrong; others run beside them."""
    model = replace(tiny_model, spec=replace(tiny_model.spec, eos_token_ids=tuple(range(0, 256, 6))))
    monkeypatch.setattr(LoadedModel, "drafting_exit", property(lambda _: drafting))

    def run(exits: ExitPolicy) -> list[tuple[list[int], str, str, list[float]]]:
        with running(model, run_through=run_through, new_drafter=lambda _: FixedDrafter(0.0, 4)) as bench:
            with bench.held():
                asked = [
                    bench.ask(prompt=PROMPT[i:], exits=exits, temperature=1.0, seed=i, ignore_eos=False)
                    for i in range(6)
                ]
                beside = [bench.ask(exits=each, max_new_tokens=40) for each in (OFF, LEAVE)]
            for one in beside:
                assert len(one.wait().ids()) == 40
            if exits is VERIFIED:
                names = {f"block_{(1, 3)[drafting]}", "final"}
                assert set().union(*(one.wait().finish.summary.depth.by_exit for one in asked)) <= names
            return [told(one.wait()) for one in asked]

    assert run(VERIFIED) == run(OFF)


@pytest.mark.parametrize("run_through", [True, False])
def test_drafts_owe_no_more_than_early_tokens_may(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, run_through: bool
) -> None:
    """A drafter without end: the eighth position that owes makes the next pass a deep one."""
    owed: list[int] = []
    run = Lifecycle.run

    def watched(lives: Lifecycle, tick: Tick) -> None:
        run(lives, tick)
        owed.extend(row.sequence.owes for row in tick.rows)

    monkeypatch.setattr(Lifecycle, "run", watched)
    with running(tiny_model, run_through=run_through, new_drafter=lambda _: FixedDrafter(0.0, 99)) as bench:
        bench.answer(exits=VERIFIED, max_new_tokens=80)
    assert max(owed) == 8


def test_a_rejected_drafts_pages_are_given_back(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once full depth has judged, a sequence holds pages for its certain tokens only."""
    spare: list[int] = []
    verify = Lifecycle._verify

    def watched(lives: Lifecycle, answer: Answer, draws: tuple[Draw, ...], stop: int) -> None:
        verify(lives, answer, draws, stop)
        table, tokens = answer.sequence.table, len(answer.sequence.tokens)
        if table.pages:
            spare.append(len(table.pages) - -(-tokens // table.page_tokens))

    monkeypatch.setattr(Lifecycle, "_verify", watched)
    wrong = [*PROMPT, *[1] * 60]
    with running(tiny_model, new_drafter=lambda _: Oracle(wrong, 1)) as bench:
        bench.answer(exits=VERIFIED, max_new_tokens=60)
    assert len(spare) > 20
    assert max(spare) == 0


class Broken:
    """Drafts well until one of its two ways fails it."""

    def __init__(self, inner: Drafter, fails: str) -> None:
        self._inner, self._fails, self._left = inner, fails, 5

    def _use(self, what: str) -> None:
        self._left -= what == self._fails
        if self._left == 0:
            raise ZeroDivisionError(what)

    def propose(self, tokens: Sequence[int], drafted: int, room: int) -> Proposal:
        self._use("propose")
        return self._inner.propose(tokens, drafted, room)

    def settled(self, stages: Sequence[int], accepted: int) -> None:
        self._use("settled")
        self._inner.settled(stages, accepted)

    def at_stake(self, tokens: Sequence[int], drafted: int, rows: int) -> float:
        self._use("at_stake")
        return self._inner.at_stake(tokens, drafted, rows)


@pytest.mark.parametrize(
    "nonsense",
    [None, Proposal(tokens=(5, 264)), Proposal(tokens=(-1,)), Proposal(tokens=None)],  # type: ignore[arg-type]
)
def test_a_drafter_that_proposes_nonsense_is_asked_no_more(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, nonsense: Any
) -> None:
    with running(tiny_model) as bench:
        plain = bench.answer()
    monkeypatch.setattr(FixedDrafter, "propose", lambda *_: nonsense)
    with running(tiny_model, new_drafter=lambda _: FixedDrafter()) as bench:
        assert told(bench.answer(exits=VERIFIED)) == told(plain)
    assert caplog.text.count("is drafted for no more") == 1


@pytest.mark.parametrize("fails", ["propose", "settled"])
def test_a_drafter_that_fails_ends_drafting_and_no_answer(
    tiny_model: LoadedModel, fails: str, caplog: pytest.LogCaptureFixture
) -> None:
    with running(tiny_model) as bench:
        plain = bench.answer(max_new_tokens=60)
    text = [*PROMPT, *plain.ids()]
    with running(tiny_model, new_drafter=lambda _: Broken(Oracle(text, 4), fails)) as bench:
        drafted = bench.answer(exits=VERIFIED, max_new_tokens=60)
    assert told(drafted) == told(plain)
    assert 0 < drafted.finish.summary.depth.drafts < 30
    assert caplog.text.count("is drafted for no more") == 1


def test_what_full_depth_cannot_judge_behind_a_wrong_draft_is_no_error() -> None:
    """A guess that makes no sense may give logits of no use; the answer does not contain it."""
    truths = [Draw(5, -0.1, 2, 10), Draw(7, -0.2, 2, 11), Draw(-1, math.nan, 2, 12, "NaN")]
    certain, accepted = confirmed_draws([5, 6], [0, LOOKUP], truths)
    assert [(draw.token, draw.stage, draw.error) for draw in certain] == [(5, 0, None), (7, 2, None)]
    assert accepted == 1
    reached, accepted = confirmed_draws([5, 7], [0, LOOKUP], truths)
    assert [draw.error for draw in reached] == [None, None, "NaN"]
    assert accepted == 2
    assert confirmed_draws([5, 7], [0, LOOKUP], truths[:2])[0][-1].stage == LOOKUP
