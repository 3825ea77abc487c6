"""Steps begun before the host has the tokens of the step in front: the same answers, and nothing left of vain ones."""

import logging
import math
import random
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from exeunt.compression.decoder import Decoder
from exeunt.compression.model import LoadedModel
from exeunt.server.request import ExitPolicy, FailureEvent, FinishReason
from exeunt.server.runner import Runner
from exeunt.server.sampling import StartedDraws
from exeunt.server.tick import Tick
from exeunt.server.tick_run import TickRun
from tests.server.conftest import BLOCKS
from tests.server.engine_bench import (
    BACKFILL,
    FULL,
    INT4_KV,
    LEAVE,
    OFF,
    PROMPT,
    VERIFIED,
    WAIT_S,
    Begun,
    Heard,
    go_by_stages,
    running,
    score,
)
from tests.server.fixed_drafter import FixedDrafter, RestingDrafter
from tests.server.test_soak import Asked, answer_of, random_request


def _beside_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ticks run as on a GPU, by stages."""
    monkeypatch.setattr(Runner, "has_graphs", property(lambda _: True))
    go_by_stages(monkeypatch)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Begun:
    """As beside captured graphs."""
    _beside_graphs(monkeypatch)
    return Begun(monkeypatch)


def test_every_step_of_an_answer_but_its_first_and_last_is_begun_ahead(
    tiny_model: LoadedModel, begun: Begun
) -> None:
    with running(tiny_model) as bench:
        heard = bench.answer(max_new_tokens=24)
    assert begun.rows == [1] * 23  # the prompt's pass has its turn, and after the last token nothing follows
    assert heard.finish.summary.depth.blocks_wasted == 0
    assert heard.finish.summary.depth.block_passes == 24 * BLOCKS


def test_nothing_is_begun_ahead_where_that_is_switched_off(tiny_model: LoadedModel, begun: Begun) -> None:
    with running(tiny_model, async_scheduling=False) as bench:
        bench.answer()
    assert begun.rows == []


def test_steps_follow_each_other_where_nothing_works_beside_the_host(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = Begun(monkeypatch)
    with running(tiny_model) as bench:
        bench.answer()
    assert begun.rows == []


@pytest.mark.parametrize(
    "asked",
    [
        {"exits": BACKFILL},
        {"exits": VERIFIED},
        {"exits": OFF, "repetition_penalty": 1.2},
        {"exits": LEAVE, "repetition_penalty": 1.2},
    ],
    ids=["backfill", "verified", "penalty", "penalty and exits"],
)
def test_what_hangs_on_a_token_waits_for_it(
    tiny_model: LoadedModel, begun: Begun, asked: dict[str, Any]
) -> None:
    with running(tiny_model, new_drafter=lambda _: FixedDrafter()) as bench:
        with bench.held():
            both = [bench.ask(max_new_tokens=20), bench.ask(max_new_tokens=20, **asked)]
        for one in both:
            one.wait()
        score(bench, PROMPT, OFF)
    assert not begun.rows


def test_a_step_that_drafts_nothing_is_begun_ahead(tiny_model: LoadedModel, begun: Begun) -> None:
    with running(tiny_model, new_drafter=lambda _: RestingDrafter()) as bench:
        off = bench.answer(max_new_tokens=24)
        begun.rows.clear()
        heard = bench.answer(max_new_tokens=24, exits=VERIFIED)
        with bench.held():
            both = [bench.ask(max_new_tokens=20, exits=exits) for exits in (OFF, VERIFIED)]
        for one in both:
            one.wait()
    assert begun.rows == [*[1] * 23, *[2] * 19]
    assert answer_of(heard) == answer_of(off)
    depth = heard.finish.summary.depth
    assert (depth.drafts, depth.blocks_wasted, depth.block_passes) == (0, 0, 24 * BLOCKS)


@pytest.mark.parametrize(("at_stake", "begins"), [(1e-9, True), (60.0, False), (math.inf, False)])
def test_a_step_whose_drafts_promise_more_than_a_head_start_waits_for_its_token(
    tiny_model: LoadedModel, begun: Begun, at_stake: float, begins: bool
) -> None:
    drafter = RestingDrafter()
    with running(tiny_model, new_drafter=lambda _: drafter) as bench:
        bench.answer(
            max_new_tokens=9, exits=VERIFIED
        )  # behind a few steps it is known what a head start gains
        begun.rows.clear()
        drafter.seconds = at_stake
        bench.answer(max_new_tokens=24, exits=VERIFIED)
    assert bool(begun.rows) == begins


@pytest.mark.parametrize("said", [None, -1.0, math.nan, ZeroDivisionError("at stake")], ids=str)
def test_a_drafter_that_has_failed_holds_up_no_step(
    tiny_model: LoadedModel,
    begun: Begun,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    said: Any,
) -> None:
    def failing(*_: object) -> Any:
        if isinstance(said, Exception):
            raise said
        return said

    monkeypatch.setattr(RestingDrafter, "at_stake", failing)
    with running(tiny_model, new_drafter=lambda _: RestingDrafter()) as bench:
        bench.answer(max_new_tokens=24, exits=VERIFIED)
    assert begun.rows == [1] * 23
    assert caplog.text.count("is drafted for no more") == 1


def test_the_device_has_the_next_step_before_the_host_waits_for_tokens(
    tiny_model: LoadedModel, begun: Begun, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    start, take = Runner._start_draws, TickRun.take_draws

    def started(runner: Runner, run: TickRun) -> None:
        order.append(f"asked for {run.tick.rows[0].stop}")
        start(runner, run)

    def taken(run: TickRun) -> None:
        order.append(f"waited for {run.tick.rows[0].stop}")
        take(run)

    monkeypatch.setattr(Runner, "_start_draws", started)
    monkeypatch.setattr(TickRun, "take_draws", taken)
    with running(tiny_model) as bench:
        bench.answer(max_new_tokens=4)
    first = len(PROMPT)
    steps = [("asked for", 0), ("asked for", 1), ("waited for", 0), ("asked for", 2), ("waited for", 1)]
    expected = [
        f"{what} {first + n}" for what, n in [*steps, ("asked for", 3), ("waited for", 2), ("waited for", 3)]
    ]
    assert order == expected


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3, "n": 2},
    {"temperature": 1.0, "seed": 5, "top_p": 0.8, "top_k": 9},
    {"temperature": 1.3, "seed": 2, "ignore_eos": False, "max_new_tokens": 200},
    {"temperature": 1.3, "seed": 4, "ignore_eos": False, "min_new_tokens": 30, "max_new_tokens": 200},
    {"stop": ("~never~",)},
    {"max_new_tokens": 1},
    {"variant": INT4_KV, "max_new_tokens": 60},
]


def _answers(model: LoadedModel, exits: ExitPolicy) -> tuple[list[Heard], dict[str, float]]:
    names = ("generation_tokens", "blocks_executed", "blocks_skipped", "blocks_wasted", "block_passes")
    calls = model.decoder(FULL).block_calls  # which serves both formats of the KV cache
    before = sum(calls.tokens)
    with running(model, new_drafter=lambda _: RestingDrafter(), max_num_seqs=12) as bench:
        text = bench.answer(exits=exits).text()
        with bench.held():
            asked = [bench.ask(exits=exits, **kind) for kind in (*KINDS, {"stop": (text[8:11],)})]
        heard = [one.wait() for one in asked]
        assert bench.engine.wait_idle(WAIT_S)
        counted = {name: bench.value(f"exeunt_{name}_total") for name in names}
    counted["called"] = sum(calls.tokens) - before
    return heard, counted


@pytest.mark.parametrize("exits", [OFF, VERIFIED], ids=["off", "verified"])
def test_answers_and_accounts_are_those_of_steps_that_follow_each_other(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, exits: ExitPolicy
) -> None:
    plain, counts = _answers(tiny_model, OFF)
    monkeypatch.setattr(Runner, "has_graphs", property(lambda _: True))
    begun = Begun(monkeypatch)
    ahead, counted = _answers(tiny_model, exits)
    assert max(begun.rows) > 3
    assert [answer_of(one) for one in ahead] == [answer_of(one) for one in plain]
    ended_by_a_token = [one.finish.summary.finish_reason is FinishReason.STOP for one in ahead]
    assert 1 < sum(ended_by_a_token) < len(KINDS)
    vain = 0.0
    for one, other in zip(ahead, plain, strict=True):
        depth, wanted = one.finish.summary.depth, other.finish.summary.depth
        vain += depth.blocks_wasted
        assert depth.blocks_wasted in (0, BLOCKS)
        assert (
            replace(depth, blocks_wasted=0, block_passes=depth.block_passes - depth.blocks_wasted) == wanted
        )
    assert vain > 0
    assert counts["blocks_wasted"] == 0
    for name in ("generation_tokens", "blocks_executed", "blocks_skipped"):
        assert counted[name] == counts[name]
    for name in ("blocks_wasted", "block_passes", "called"):
        assert counted[name] == counts[name] + vain


@pytest.mark.parametrize("seed", range(3))
def test_a_crowd_that_comes_and_goes_gets_the_answers_it_gets_alone(
    tiny_model: LoadedModel, begun: Begun, seed: int
) -> None:
    """Few pages, callers who cancel, requests of other kinds in between."""
    dice = random.Random(seed)
    requests = [random_request(dice, number) for number in range(60)]
    plain = {"exits": OFF, "repetition_penalty": 1.0}
    requests = [
        Asked(one.request | plain, scored=False) if not one.scored and dice.random() < 0.8 else one
        for one in requests
    ]
    with running(tiny_model, max_num_seqs=3, async_scheduling=False) as bench:
        alone = [answer_of(one.send(bench, alone=True).wait()) for one in requests]
    begun.rows.clear()
    with running(
        tiny_model, 24, max_num_seqs=12, max_num_batched_tokens=64, max_num_queued_reqs=100
    ) as bench:
        asked = []
        for request in requests:
            asked.append(request.send(bench))
            if dice.random() < 0.2:
                vain = bench.ask(max_new_tokens=300, temperature=1.0)
                if dice.random() < 0.5:
                    _first_token(vain)
                bench.engine.cancel(f"r{bench.count}")
            if dice.random() < 0.3:
                asked[-1].wait()
        crowd = [answer_of(one.wait()) for one in asked]
    assert len(begun.rows) > 50
    for request, one, other in zip(requests, crowd, alone, strict=True):
        assert one == other, request


def _first_token(heard: Heard) -> None:
    for _ in range(WAIT_S * 1000):
        if heard.ids() or heard.done.wait(0.001):
            return


def test_a_request_that_comes_is_let_in_behind_the_step_that_was_begun(
    tiny_model: LoadedModel, begun: Begun
) -> None:
    with running(tiny_model, max_num_seqs=2) as bench:
        long = bench.ask(max_new_tokens=400)
        _first_token(long)
        late = bench.answer(max_new_tokens=5)
        assert len(late.ids()) == 5
        assert len(long.ids()) < 400  # it did not wait for the other's end
        bench.engine.cancel("r1")
        long.wait()
    assert max(begun.rows) == 2


def test_a_request_cut_short_counts_the_step_that_was_begun_for_it(
    tiny_model: LoadedModel, begun: Begun
) -> None:
    with running(tiny_model) as bench:
        heard = bench.ask(max_new_tokens=400)
        _first_token(heard)
        bench.engine.cancel("r1")
        summary = heard.wait().finish.summary
        assert summary.finish_reason is FinishReason.CANCELLED
        assert summary.depth.blocks_wasted == BLOCKS
        assert bench.engine.wait_idle(WAIT_S)
        assert bench.engine._runner.ahead is None


@pytest.mark.parametrize("after_its_blocks", [False, True])
def test_a_step_that_cannot_be_begun_ahead_costs_nothing_but_its_head_start(
    tiny_model: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    after_its_blocks: bool,
) -> None:
    wanted, _ = _spoken(tiny_model)
    _beside_graphs(monkeypatch)
    tried: list[Tick] = []
    begin = Runner._begin

    def failing(runner: Runner, ahead: TickRun, run: TickRun, drawn: torch.Tensor) -> None:
        tried.append(ahead.tick)
        if after_its_blocks:
            begin(runner, ahead, run, drawn)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Runner, "_begin", failing)
    calls = tiny_model.decoder(FULL).block_calls
    before = sum(calls.tokens)
    with caplog.at_level(logging.WARNING):
        spoken, counted = _spoken(tiny_model)
    assert spoken == wanted
    assert len(tried) == 1
    prompts = 3 * (len(PROMPT) - 1) * BLOCKS  # the last prompt token's pass is the first generated token's
    assert sum(calls.tokens) - before == prompts + counted
    assert counted == 3 * (24 + after_its_blocks) * BLOCKS
    assert [record.message for record in caplog.records] == [
        "no step is begun before its turn any more: the last such failed"
    ]


def _spoken(model: LoadedModel) -> tuple[list[list[int]], float]:
    """Three answers, and the block × token pairs that were counted for them."""
    with running(model) as bench:
        with bench.held():
            asked = [bench.ask(temperature=0.9, seed=i) for i in range(3)]
        ids = [one.wait().ids() for one in asked]
        assert bench.engine.wait_idle(WAIT_S)
        kinds = ("executed", "wasted")
        return ids, sum(bench.value(f"exeunt_blocks_{kind}_total") for kind in kinds)


def test_draws_that_fail_fail_their_tick_and_later_requests_are_served(
    tiny_model: LoadedModel, begun: Begun, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait, waits = StartedDraws.wait, [0]

    def failing(draws: StartedDraws) -> Any:
        waits[0] += 1
        if waits[0] == 6:
            raise RuntimeError("the copy failed")
        return wait(draws)

    monkeypatch.setattr(StartedDraws, "wait", failing)
    with running(tiny_model) as bench:
        heard = bench.ask(max_new_tokens=30).wait()
        assert isinstance(heard.events[-1], FailureEvent)
        assert len(heard.ids()) == 5
        assert len(bench.answer(max_new_tokens=7).ids()) == 7
        assert bench.engine.wait_idle(WAIT_S)
        assert bench.engine._lives.holds_nothing


def test_a_row_without_a_token_fails_alone_and_the_others_go_on(
    tiny_model: LoadedModel, begun: Begun, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _ = _spoken(tiny_model)
    head = Decoder.head
    steps = [0]

    def spoilt(decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        logits = head(decoder, hidden)
        steps[0] += 1
        if steps[0] == 9:
            logits[1] = torch.nan
        return logits

    monkeypatch.setattr(Decoder, "head", spoilt)
    with running(tiny_model) as bench:
        with bench.held():
            asked = [bench.ask(temperature=0.9, seed=i) for i in range(3)]
        heard = [one.wait() for one in asked]
    assert isinstance(heard[1].events[-1], FailureEvent)
    assert heard[1].ids() == wanted[1][:8]
    assert [heard[0].ids(), heard[2].ids()] == [wanted[0], wanted[2]]


def test_time_of_steps_begun_ahead_adds_up_to_no_more_than_passed(
    tiny_model: LoadedModel, begun: Begun
) -> None:
    began = time.perf_counter()
    with running(tiny_model) as bench:
        bench.answer(max_new_tokens=40)
        passed = time.perf_counter() - began
        assert bench.value("exeunt_step_duration_seconds_count", stage="0") == 40
        assert 0 < bench.value("exeunt_step_duration_seconds_sum") < passed
