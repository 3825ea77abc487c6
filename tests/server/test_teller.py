"""Tokens that are told while the device works: the same answers, in order, and one request's trouble its own."""

import time
from typing import Any

import pytest

from exeunt.compression.model import LoadedModel
from exeunt.server.detokenizer import StreamDetokenizer
from exeunt.server.request import Event, FailureEvent, FinishEvent, FinishReason, StepEvent
from exeunt.server.row_result import RowResult
from exeunt.server.runner import Runner
from exeunt.server.tick import Tick
from tests.server.engine_bench import BACKFILL, LEAVE, OFF, VERIFIED, WAIT_S, Heard, running

KINDS: list[dict[str, Any]] = [
    {"exits": OFF},
    {"exits": OFF, "temperature": 1.0, "seed": 3, "n": 2},
    {"exits": LEAVE, "temperature": 1.0, "seed": 5},
    {"exits": BACKFILL},
    {"exits": VERIFIED},
    {"exits": OFF, "ignore_eos": False, "temperature": 1.0, "seed": 2},
]


@pytest.fixture
def kept_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As beside captured graphs."""
    monkeypatch.setattr(Runner, "has_graphs", property(lambda _: True))


def _answers(model: LoadedModel) -> list[Heard]:
    with running(model, max_num_seqs=8) as bench:
        heard = [one.wait() for one in [bench.ask(**kind) for kind in KINDS]]
        stop = heard[0].text()[8:11]
        heard.append(bench.answer(stop=(stop,)))
        assert bench.engine.wait_idle(WAIT_S)
        tokens = sum(len(one.ids(choice)) for one in heard for choice in range(one.choices))
        assert bench.value("exeunt_generation_tokens_total") == tokens
    return heard


def test_answers_are_those_of_a_server_that_tells_at_once(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = _answers(tiny_model)
    monkeypatch.setattr(Runner, "has_graphs", property(lambda _: True))
    for found, plain in zip(_answers(tiny_model), wanted, strict=True):
        for choice in range(plain.choices):
            assert found.ids(choice) == plain.ids(choice)
            assert found.text(choice) == plain.text(choice)
        one, other = found.finish.summary, plain.finish.summary
        assert (one.finish_reason, one.depth.by_exit, one.nll) == (
            other.finish_reason,
            other.depth.by_exit,
            other.nll,
        )


def test_later_tokens_are_told_while_the_next_tick_runs(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, kept_back: None
) -> None:
    run, running_now, told = Runner.run, [False], []

    def watched(self: Runner, tick: Tick, *given: Any) -> list[RowResult]:
        running_now[0] = True
        try:
            return run(self, tick, *given)
        finally:
            running_now[0] = False

    monkeypatch.setattr(Runner, "run", watched)
    heard = Heard()

    class Watching(Heard):
        def __call__(self, event: Event) -> None:
            told.append((isinstance(event, StepEvent), running_now[0]))
            heard(event)

    monkeypatch.setattr("tests.server.engine_bench.Heard", Watching)
    with running(tiny_model) as bench:
        bench.ask(max_new_tokens=6)
        heard.wait()
    # the first at once, the last with the answer's end
    assert told == [(True, False), *[(True, True)] * 4, (True, False), (False, False)]


def test_a_caller_who_is_gone_is_dropped_and_the_others_go_on(
    tiny_model: LoadedModel, kept_back: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(Heard):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if len(self.events) == 3:
                raise RuntimeError("the connection is closed")

    with running(tiny_model) as bench:
        with monkeypatch.context() as patch:
            patch.setattr("tests.server.engine_bench.Heard", Gone)
            gone = bench.ask(max_new_tokens=400)
        assert len(bench.answer(max_new_tokens=40).ids()) == 40
        assert bench.engine.wait_idle(WAIT_S)
        assert bench.engine._lives.holds_nothing
        assert len(gone.events) == 3
        assert bench.value("exeunt_generation_tokens_total") < 50


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Have the first answer's token `number`, counted from 1, fail as it is turned into text."""
    push, counts = StreamDetokenizer.push, dict[int, int]()

    def counted(self: StreamDetokenizer, token_id: int) -> str:
        first = next(iter(counts), id(self))
        counts[id(self)] = counts.get(id(self), 0) + 1
        if id(self) == first and counts[first] == number:
            raise RuntimeError("no text")
        return push(self, token_id)

    monkeypatch.setattr(StreamDetokenizer, "push", counted)


@pytest.mark.parametrize("number", [1, 4, 29, 30])
def test_a_token_that_cannot_be_told_fails_its_own_request(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, kept_back: None, number: int
) -> None:
    fail_at(monkeypatch, number)
    with running(tiny_model) as bench:
        first, other = bench.ask(max_new_tokens=30), bench.ask(max_new_tokens=30)
        failure = first.wait().events[-1]
        assert isinstance(failure, FailureEvent)
        assert failure.kind == "internal"
        assert len(first.ids()) == number - 1
        assert len(other.wait().ids()) == 30
        assert bench.engine.wait_idle(WAIT_S)
        assert bench.engine._lives.holds_nothing


def test_an_answer_that_breaks_takes_the_others_of_its_request(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, kept_back: None
) -> None:
    fail_at(monkeypatch, 30)
    with running(tiny_model) as bench:
        heard = bench.ask(max_new_tokens=30, n=2).wait()
        assert isinstance(heard.events[-1], FailureEvent)
        assert not [event for event in heard.events if isinstance(event, FinishEvent) and event.choice == 0]
        assert bench.engine.wait_idle(WAIT_S)
        assert bench.engine._lives.holds_nothing


def test_what_is_owed_is_told_before_a_request_is_cut_short(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, kept_back: None
) -> None:
    run = Runner.run

    def slow(self: Runner, tick: Tick, *given: Any) -> list[RowResult]:
        time.sleep(0.002)
        return run(self, tick, *given)

    monkeypatch.setattr(Runner, "run", slow)
    with running(tiny_model) as bench:
        late = bench.ask(max_new_tokens=480, timeout_s=0.5)
        summary = late.wait().finish.summary
        assert summary.finish_reason is FinishReason.TIMEOUT
        assert summary.completion_tokens == len(late.ids()) > 2
        assert bench.engine.wait_idle(WAIT_S)
        assert bench.value("exeunt_generation_tokens_total") == len(late.ids())


def test_a_tick_that_fails_fails_its_requests_after_what_they_are_owed(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, kept_back: None
) -> None:
    run, ticks = Runner.run, [0]

    def failing(self: Runner, tick: Tick, *given: Any) -> list[RowResult]:
        ticks[0] += 1
        if ticks[0] == 6:
            raise RuntimeError("a bug")
        return run(self, tick, *given)

    monkeypatch.setattr(Runner, "run", failing)
    with running(tiny_model) as bench:
        heard = bench.ask(max_new_tokens=30).wait()
        assert isinstance(heard.events[-1], FailureEvent)
        assert len(heard.ids()) == 5  # one of the prompt's pass, four of decode steps
        assert len(bench.answer(max_new_tokens=7).ids()) == 7
        assert bench.engine.wait_idle(WAIT_S)
        assert bench.engine._lives.holds_nothing


def test_ticks_that_are_launched_operation_by_operation_have_all_told_before(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, kept_back: None
) -> None:
    run, owed = Runner.run, list[bool]()

    def watched(self: Runner, tick: Tick, *given: Any) -> list[RowResult]:
        owed.append(bool(bench.engine._lives._teller._owed))
        return run(self, tick, *given)

    monkeypatch.setattr(Runner, "run", watched)
    for most, expected in ((0, False), (512, True)):
        monkeypatch.setattr("exeunt.server.lifecycle.TOKENS", (most,))
        owed.clear()
        with running(tiny_model) as bench:
            bench.answer(max_new_tokens=8)
        assert any(owed) is expected


def test_nothing_is_kept_of_a_caller_who_does_not_hear_its_failure(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, kept_back: None
) -> None:
    class Deaf(Heard):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if isinstance(event, FailureEvent):
                raise RuntimeError("the connection is closed")

    fail_at(monkeypatch, 4)
    monkeypatch.setattr("tests.server.engine_bench.Heard", Deaf)
    with running(tiny_model) as bench:
        assert isinstance(bench.ask(max_new_tokens=30).wait().events[-1], FailureEvent)
        assert bench.engine.wait_idle(WAIT_S)
        assert bench.engine._lives.holds_nothing
