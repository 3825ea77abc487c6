"""The engine's face: whom it lets in, how it stops, and that nobody is left waiting."""

import time

import pytest

from exeunt.compression.model import LoadedModel
from exeunt.server.engine import EngineStoppedError, QueueFullError, RequestTooLargeError
from exeunt.server.request import (
    FailureEvent,
)
from exeunt.server.scheduler import Scheduler
from tests.server.engine_bench import OFF, PROMPT, WAIT_S, running, score


def test_full_queue_and_too_large_requests_are_refused(tiny_model: LoadedModel) -> None:
    with running(tiny_model, pages=14, max_num_seqs=1, max_num_queued_reqs=1) as bench:
        with pytest.raises(RequestTooLargeError, match="224"):
            bench.ask(max_new_tokens=400)
        first = bench.ask(max_new_tokens=150)
        while not first.ids():
            time.sleep(0.002)
        second = bench.ask(max_new_tokens=5)
        with pytest.raises(QueueFullError, match="1 request"):
            bench.ask(max_new_tokens=5)
        first.wait(), second.wait()


def test_the_queues_limit_counts_each_request_once_however_it_ends(tiny_model: LoadedModel) -> None:
    """Scores and answers that are preempted, cancelled while waiting or too short to run leave the queue once."""
    with running(tiny_model, pages=14, max_num_seqs=4, max_num_queued_reqs=3) as bench:
        for round_ in range(6):
            heard = bench.ask(max_new_tokens=60, n=2)
            bench.engine.cancel("nobody")
            score(bench, PROMPT * 4, OFF)
            score(bench, PROMPT[:1], OFF)
            if round_ % 2:
                bench.engine.cancel(f"r{bench.count}")
            heard.wait()
            assert bench.engine.wait_idle(WAIT_S)
        assert bench.engine._queued == 0
        assert bench.value("exeunt_num_requests_running") == bench.value("exeunt_num_requests_waiting") == 0


def test_draining_finishes_what_runs_and_takes_no_more(tiny_model: LoadedModel) -> None:
    with running(tiny_model) as bench:
        heard = bench.ask(max_new_tokens=60)
        assert bench.engine.drain(WAIT_S)
        assert len(heard.wait().ids()) == 60
        with pytest.raises(EngineStoppedError):
            bench.ask()


def test_stopping_tells_every_caller(tiny_model: LoadedModel) -> None:
    with running(tiny_model) as bench:
        heard = bench.ask(max_new_tokens=480)
        bench.engine.stop()
        last = heard.wait().events[-1]
    assert isinstance(last, FailureEvent)
    assert last.kind == "shutdown"


def test_a_bug_outside_a_tick_is_told_to_everybody_and_lets_nobody_in(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Scheduler) -> None:
        raise KeyError("a bug in the scheduler")

    with running(tiny_model) as bench:
        assert bench.engine.alive
        bench.answer()
        monkeypatch.setattr(Scheduler, "next_tick", broken)
        last = bench.answer().events[-1]
        assert isinstance(last, FailureEvent)
        assert last.kind == "internal"
        assert not bench.engine.alive
        with pytest.raises(EngineStoppedError):
            bench.ask()
