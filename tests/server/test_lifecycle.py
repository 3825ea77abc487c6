"""Requests' lives on a tiny real model: what is counted of them, how they end, and what they leave behind."""

import random
import time
from typing import Any

import pytest

from exeunt.compression.decoder import Decoder
from exeunt.compression.model import LoadedModel
from exeunt.compression.model_pass import ModelPass
from exeunt.server.answer import Answer
from exeunt.server.audit import AuditBook
from exeunt.server.block_account import BlockAccount
from exeunt.server.detokenizer import StreamDetokenizer, TokenPieces
from exeunt.server.lifecycle import Lifecycle
from exeunt.server.metrics import Metrics
from exeunt.server.request import (
    Event,
    ExitPolicy,
    FailureEvent,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    StepEvent,
)
from exeunt.server.row_result import RowResult
from exeunt.server.runner import Runner
from exeunt.server.scheduler import Scheduler
from exeunt.server.scores import Scores
from exeunt.server.tick import Tick
from tests.server.engine_bench import (
    BACKFILL,
    FULL,
    INT4_KV,
    LEAVE,
    LINEAR,
    NATIVE,
    OFF,
    PROMPT,
    VERIFIED,
    WAIT_S,
    Heard,
    ScoreError,
    go_by_stages,
    running,
    score,
)


def test_totals_are_the_block_calls_that_happened(tiny_model: LoadedModel) -> None:
    with running(tiny_model, max_num_seqs=4) as bench:
        bench.answer(exits=LEAVE)  # warm
        calls = tiny_model.decoder(FULL).block_calls
        before = sum(calls.tokens)
        names = ("block_1", "block_3", "final")
        exits_before = {name: bench.value("exeunt_exit_tokens_total", exit=name) for name in names}
        asked = [bench.ask(exits=LEAVE, seed=i, temperature=1.0) for i in range(4)]
        heard = [one.wait() for one in asked]
        assert bench.engine.wait_idle(WAIT_S)
        after = sum(calls.tokens)
        depth = [one.finish.summary.depth for one in heard]
        blocks = tiny_model.spec.blocks
        tokens = sum(len(one.ids()) for one in heard)
        assert sum(d.blocks_executed + d.blocks_skipped for d in depth) == tokens * blocks
        prompt = 4 * (len(PROMPT) - 1) * blocks  # the last prompt token's pass is the first generated token's
        assert after - before == sum(d.blocks_executed for d in depth) + prompt
        assert sum(d.block_passes for d in depth) == sum(d.blocks_executed for d in depth)
        warm = 24
        assert bench.value("exeunt_generation_tokens_total", mode="approximate") == tokens + warm
        for name in ("block_1", "block_3", "final"):
            said = sum(d.by_exit.get(name, 0) for d in depth)
            assert said > 0
            counted = bench.value("exeunt_exit_tokens_total", exit=name, mode="approximate")
            assert counted - exits_before[name] == said
        executed = bench.value("exeunt_blocks_executed_total")
        skipped = bench.value("exeunt_blocks_skipped_total")
        assert executed + skipped == (tokens + warm) * blocks


def test_a_request_of_several_answers_is_one_request(tiny_model: LoadedModel) -> None:
    with running(tiny_model) as bench:
        heard = bench.answer(n=3, temperature=1.0, seed=11)
        score(bench, PROMPT, OFF)
        for name in (
            "time_to_first_token_seconds",
            "e2e_request_latency_seconds",
            "request_queue_time_seconds",
        ):
            assert bench.value(f"exeunt_{name}_count") == 1
        tokens = sum(len(heard.ids(choice)) for choice in range(3))
        assert bench.value("exeunt_request_generation_tokens_count") == 1
        assert bench.value("exeunt_request_generation_tokens_sum") == tokens
        assert bench.value("exeunt_compression_requests_total", method="weights") == 2  # the score, too


@pytest.mark.parametrize("run_through", [True, False])
def test_step_metrics_name_the_stages_that_were_run(tiny_model: LoadedModel, run_through: bool) -> None:
    began = time.perf_counter()
    with running(tiny_model, run_through=run_through) as bench:
        heard = bench.answer(exits=LEAVE, max_new_tokens=30)
        exits = heard.exits()
        depth = {"block_1": 1, "block_3": 2, "final": 3}  # stages that a token passed
        passed = [sum(depth[name] > stage for name in exits) for stage in range(3)]
        assert passed[0] == 30 > passed[1] > passed[2] > 0
        for stage, count in enumerate(passed):
            label = {"stage": str(stage)}
            assert bench.value("exeunt_step_batch_size_count", **label) == count
            assert bench.value("exeunt_step_batch_size_sum", **label) == count
            assert bench.value("exeunt_step_duration_seconds_count", **label) == count
            assert bench.value("exeunt_step_duration_seconds_sum", **label) > 0
    assert bench.value("exeunt_step_duration_seconds_sum") < time.perf_counter() - began


def test_summary_adds_up_to_its_tokens(tiny_model: LoadedModel) -> None:
    with running(tiny_model) as bench:
        heard = bench.answer(exits=LEAVE, temperature=1.0, seed=4, max_new_tokens=50)
    tokens = [t for e in heard.events if isinstance(e, StepEvent) for t in e.tokens]
    summary = heard.finish.summary
    assert summary.completion_tokens == len(tokens) == 50
    assert summary.nll == pytest.approx(-sum(t.logprob for t in tokens))
    assert summary.depth.blocks_executed == sum(t.depth for t in tokens)
    assert {t.depth for t in tokens} <= {2, 4, 6}
    assert tokens[0].exit == "final"  # a prompt's last token never leaves early


def test_stop_string_across_tokens_cuts_the_text(tiny_model: LoadedModel) -> None:
    with running(tiny_model) as bench:
        whole = bench.answer(max_new_tokens=40)
        text = whole.text()
        printable = [
            i
            for i in range(2, len(text) - 3)
            if text[i : i + 2].isascii() and text.find(text[i : i + 2]) == i
        ]
        at = printable[len(printable) // 2]
        stop = text[at : at + 2]
        heard = bench.answer(max_new_tokens=40, stop=(stop,))
    assert heard.text() == text[:at]
    assert heard.finish.summary.finish_reason is FinishReason.STOP
    assert len(heard.ids()) < 40


def test_end_of_text_ends_and_min_new_tokens_puts_it_off(tiny_model: LoadedModel) -> None:
    with running(tiny_model) as bench:
        free = bench.answer(ignore_eos=True, temperature=1.5, max_new_tokens=400, seed=2)
        at = next((i for i, t in enumerate(free.ids()) if t == 256), None)
        assert at is not None, "choose a seed that meets the end of text"
        ended = bench.answer(ignore_eos=False, temperature=1.5, max_new_tokens=400, seed=2)
        assert ended.ids() == free.ids()[: at + 1]
        assert ended.finish.summary.finish_reason is FinishReason.STOP
        assert "endoftext" not in ended.text()
        later = bench.answer(
            ignore_eos=False, temperature=1.5, max_new_tokens=400, seed=2, min_new_tokens=at + 5
        )
        assert len(later.ids()) >= at + 5


def test_cancelling_frees_everything_and_says_so(tiny_model: LoadedModel) -> None:
    with running(tiny_model, max_num_seqs=2) as bench:
        asked = [bench.ask(max_new_tokens=400, exits=LEAVE) for _ in range(5)]
        while not asked[0].ids():
            time.sleep(0.005)
        for i in (1, 3, 5):
            bench.engine.cancel(f"r{i}")
        reasons = [heard.wait().finish.summary.finish_reason for heard in asked]
    assert [r is FinishReason.CANCELLED for r in reasons] == [True, False, True, False, True]


def test_time_out_before_the_first_token_fails_and_after_it_finishes(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Runner.run

    def slow(self: Runner, tick: Tick, *given: Any) -> list[RowResult]:
        time.sleep(0.005)
        return run(self, tick, *given)

    monkeypatch.setattr(Runner, "run", slow)
    with running(tiny_model, max_num_seqs=1) as bench:
        long = bench.ask(max_new_tokens=480, timeout_s=1.0)  # 480 ticks take at least 2.4 s
        waiting = bench.ask(max_new_tokens=5, timeout_s=0.05)
        late = waiting.wait().events[-1]
        assert isinstance(late, FailureEvent)
        assert late.kind == "timeout"
        ended = long.wait()
    assert ended.finish.summary.finish_reason is FinishReason.TIMEOUT
    assert 0 < len(ended.ids()) < 480
    assert bench.value("exeunt_e2e_request_latency_seconds_count") == 1  # the one that was answered


def _broken(monkeypatch: pytest.MonkeyPatch, error: Exception, *, whole: bool) -> None:
    """Have every tick fail, on its way by stages or in the one call."""

    def fails(*_: Any) -> Any:
        raise error

    if whole:
        monkeypatch.setattr(ModelPass, "run", fails)
    else:
        go_by_stages(monkeypatch)
        monkeypatch.setattr(Decoder, "head", fails)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=NATIVE)])
def test_an_exception_in_a_tick_fails_its_requests_and_the_engine_lives_on(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    with running(tiny_model) as bench:
        _broken(monkeypatch, MemoryError("no room"), whole=whole)
        failure = bench.answer().events[-1]
        assert isinstance(failure, FailureEvent)
        assert failure.kind == "internal"
        monkeypatch.undo()
        assert len(bench.answer().ids()) == 24


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=NATIVE)])
def test_an_engine_whose_device_answers_no_more_tells_everybody_and_is_not_alive(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    with running(tiny_model, max_num_seqs=1) as bench:
        _broken(monkeypatch, RuntimeError("launch"), whole=whole)
        monkeypatch.setattr(Runner, "device_answers", lambda _: False)
        with bench.held():
            asked = [bench.ask() for _ in range(3)]
        assert [type(each.wait().events[-1]) for each in asked] == [FailureEvent] * 3
        assert not bench.engine.alive


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_exception_in_what_follows_a_tick_fails_one_request_alone(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A bug that only some rows meet: the others of their ticks go on, and nothing is kept of those that met it."""
    apply = Lifecycle._apply

    def meets_it(lives: Lifecycle, result: RowResult) -> None:
        chosen = result.row.sequence.name in ("r2/0", "s4")
        if chosen and when == "before":
            raise LookupError("a bug")
        apply(lives, result)
        if chosen:
            raise LookupError("a bug")

    monkeypatch.setattr(Lifecycle, "_apply", meets_it)
    with running(tiny_model, max_num_seqs=4) as bench:
        with bench.held():
            asked = [bench.ask(seed=i, temperature=1.0) for i in range(3)]
        assert [len(asked[i].wait().ids()) for i in (0, 2)] == [24, 24]
        failure = asked[1].wait().events[-1]
        assert isinstance(failure, FailureEvent)
        assert failure.error_id
        if when == "before":
            with pytest.raises(ScoreError, match="internal"):
                score(bench, PROMPT, OFF)


def raising_once(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, at: int) -> list[int]:
    """Have a method raise in its call number `at`, and count its calls."""
    method, calls = getattr(owner, name), [0]

    def raises(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise ArithmeticError(f"{name} has a bug")
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, raises)
    return calls


@pytest.mark.parametrize("exits", [OFF, LEAVE, BACKFILL, VERIFIED], ids=lambda exits: str(exits.mode))
@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        (TokenPieces, "of", 3),
        (BlockAccount, "ran", 5),
        (BlockAccount, "emitted", 5),
        (BlockAccount, "close", 2),
        (Answer, "count", 7),
        (Answer, "summary", 1),
        (Answer, "finish_reason", 9),
        (AuditBook, "note", 2),
        (Metrics, "token", 11),
        (Metrics, "finished", 1),
        (StreamDetokenizer, "push", 6),
        (StreamDetokenizer, "finish", 1),
        (Scheduler, "finish_pass", 4),
        (Lifecycle, "_sequence", 2),
    ],
)
def test_a_bug_anywhere_in_a_requests_life_is_that_requests_alone(
    tiny_model: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    exits: ExitPolicy,
    owner: type,
    name: str,
    at: int,
) -> None:
    """Whatever raises, everybody hears of an end: one of a failure, the others of their answers."""
    calls = raising_once(monkeypatch, owner, name, at)
    with running(tiny_model, audit_share=1.0, max_num_seqs=4) as bench:
        with bench.held():
            asked = [bench.ask(exits=exits, seed=i, temperature=1.0) for i in range(4)]
        ends = [one.wait().events[-1] for one in asked]
        failed = [end for end in ends if isinstance(end, FailureEvent)]
        assert len(failed) == (1 if calls[0] >= at else 0)
        assert all(end.kind == "internal" and end.error_id for end in failed)
        assert bench.engine.alive
        assert len(bench.answer(exits=exits).ids()) == 24
        for counter in ("blocks_executed", "blocks_skipped", "blocks_wasted", "generation_tokens"):
            assert bench.value(f"exeunt_{counter}_total") >= 0


@pytest.mark.parametrize("text", [(5,), PROMPT])
@pytest.mark.parametrize(("owner", "name"), [(TokenPieces, "of"), (Scores, "begin"), (Runner, "leave")])
def test_a_bug_in_scoring_is_told_and_stops_nothing(
    tiny_model: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    text: tuple[int, ...],
    owner: type,
    name: str,
) -> None:
    with running(tiny_model) as bench:
        raising_once(monkeypatch, owner, name, 1)
        if name == "leave":  # its caller has been answered by then
            assert len(score(bench, text, OFF)) == len(text)
        else:
            with pytest.raises(ScoreError, match="internal"):
                score(bench, text, OFF)
        assert len(score(bench, text, OFF)) == len(text)


def test_a_bug_that_ends_the_engine_is_told_to_everybody(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where letting the first of them go fails too."""
    monkeypatch.setattr(Scheduler, "next_tick", lambda _: 1 / 0)
    raising_once(monkeypatch, Lifecycle, "_release", 1)

    def ask() -> None:
        with running(tiny_model) as bench:
            with bench.held():
                asked = [bench.ask(seed=i) for i in range(3)]
            heard.extend(one.wait() for one in asked)

    heard: list[Heard] = []
    with pytest.raises(RuntimeError, match="still holds"):  # what could not be let go
        ask()
    assert [isinstance(one.events[-1], FailureEvent) for one in heard] == [True] * 3


def test_a_caller_that_raises_loses_only_its_own_request(tiny_model: LoadedModel) -> None:
    with running(tiny_model) as bench:

        def gone(event: Event) -> None:
            raise ConnectionResetError("the client hung up")

        request = GenerationRequest(
            "gone", PROMPT, SamplingParams(max_new_tokens=50, ignore_eos=True), FULL, OFF
        )
        bench.engine.submit(request, gone)
        assert len(bench.answer().ids()) == 24


def test_random_cancellations_leave_nothing_behind(tiny_model: LoadedModel) -> None:
    dice = random.Random(1)
    with running(tiny_model, pages=16, max_num_seqs=6, max_num_batched_tokens=40) as bench:
        asked = []
        for i in range(40):
            prompt = tuple(dice.randrange(256) for _ in range(dice.choice((1, 20, 60))))
            variant = dice.choice((FULL, INT4_KV, LINEAR))
            asked.append(bench.ask(prompt=prompt, variant=variant, exits=dice.choice((OFF, LEAVE)), seed=i))
            if dice.random() < 0.5:
                bench.engine.cancel(f"r{dice.randint(1, i + 1)}")
            time.sleep(dice.random() * 0.01)
        for heard in asked:
            heard.wait()
