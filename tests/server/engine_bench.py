"""A running engine on a tiny real model, and what its callers hear."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from exeunt.compression.kv_format import page_bytes_for
from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.kernels.native.library import native_library
from exeunt.server.device_passes import DevicePasses
from exeunt.server.drafting import Drafter
from exeunt.server.engine import Engine
from exeunt.server.engine_config import EngineConfig
from exeunt.server.exit_guard import ExitGuard
from exeunt.server.metrics import Metrics
from exeunt.server.request import (
    Event,
    ExitPolicy,
    FailureEvent,
    FinishEvent,
    GenerationRequest,
    SamplingParams,
    ScoredToken,
    ScoreRequest,
    StepEvent,
)
from exeunt.server.runner import Runner
from exeunt.server.tick_run import TickRun
from exeunt.server.whole_passes import WholePasses

FULL, INT4_KV, LINEAR = Variant(), Variant(kv_cache="int4"), Variant(linear_block=True)
OFF, LEAVE = ExitPolicy(), ExitPolicy("approximate", threshold=0.5)
BACKFILL = ExitPolicy("approximate", threshold=0.5, skipped_kv="backfill")
VERIFIED = ExitPolicy("verified")
PROMPT = tuple(b"The stage is empty. They leave.")
WAIT_S = 300 if torch.cuda.is_available() else 60  # a GPU first compiles its kernels
NATIVE = pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)


@dataclass
class Heard:
    """Everything a caller heard of one request."""

    events: list[Event] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    choices: int = 1
    prompt: tuple[int, ...] = ()
    mode: str = "off"

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        ended = sum(isinstance(e, FinishEvent) for e in self.events)
        if isinstance(event, FailureEvent) or ended == self.choices:
            self.done.set()

    def wait(self) -> "Heard":
        assert self.done.wait(WAIT_S), "the request never ended"
        return self

    def ids(self, choice: int = 0) -> list[int]:
        return [
            t.id for e in self.events if isinstance(e, StepEvent) and e.choice == choice for t in e.tokens
        ]

    def exits(self) -> list[str]:
        return [t.exit for e in self.events if isinstance(e, StepEvent) for t in e.tokens]

    def text(self, choice: int = 0) -> str:
        return "".join(
            e.text for e in self.events if isinstance(e, StepEvent | FinishEvent) and e.choice == choice
        )

    @property
    def finish(self) -> FinishEvent:
        return next(e for e in self.events if isinstance(e, FinishEvent))


@dataclass
class Bench:
    """A running engine with its metrics."""

    engine: Engine
    registry: CollectorRegistry
    count: int = 0

    def ask(
        self,
        prompt: tuple[int, ...] = PROMPT,
        variant: Variant = FULL,
        exits: ExitPolicy = OFF,
        n: int = 1,
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> Heard:
        self.count += 1
        heard = Heard(choices=n, prompt=prompt, mode=exits.mode)
        params = replace(SamplingParams(max_new_tokens=24, ignore_eos=True), **sampling)
        now = time.monotonic()
        deadline = None if timeout_s is None else now + timeout_s
        request = GenerationRequest(f"r{self.count}", prompt, params, variant, exits, n, now, deadline)
        self.engine.submit(request, heard)
        return heard

    def answer(self, **kwargs: Any) -> Heard:
        return self.ask(**kwargs).wait()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the engine begin with what is asked inside only when all of it is asked."""
        asked = threading.Event()

        def wait() -> None:
            asked.wait(WAIT_S)

        self.engine._commands.put(wait)
        yield
        asked.set()

    def value(self, name: str, **labels: str) -> float:
        return sum(
            sample.value
            for metric in self.registry.collect()
            for sample in metric.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@contextmanager
def running(
    model: LoadedModel,
    pages: int = 400,
    run_through: bool = True,
    new_drafter: Callable[[GenerationRequest], Drafter] | None = None,
    audit_share: float = 0.0,
    guard: ExitGuard | None = None,
    **limits: int,
) -> Iterator[Bench]:
    registry = CollectorRegistry()
    exits = [f"block_{head.block}" for head in model.exits]
    metrics = Metrics(registry, "tiny", [str(i) for i in range(len(exits) + 1)], exits)
    page_bytes = page_bytes_for(model.spec, model.dtype)
    settings: dict[str, Any] = {"max_model_len": 512, "max_num_batched_tokens": 128, **limits}
    config = EngineConfig(
        kv_cache_bytes=pages * page_bytes,
        audit_share=audit_share,
        scheduling="run-through" if run_through else "queues",
        **settings,
    )
    engine = Engine(model, config, metrics, new_drafter=new_drafter, guard=guard)
    engine.start()
    try:
        yield Bench(engine, registry)
        assert engine.wait_idle(WAIT_S)
        engine.check_integrity()
        snapshot = engine.snapshot()
        assert snapshot.kv_pages_free == snapshot.kv_pages_total
    finally:
        engine.stop()


def go_by_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ticks go by stages, as on a GPU."""
    monkeypatch.setattr(WholePasses, "of", lambda *_: None)


def ask_score(
    bench: Bench, text: tuple[int, ...], exits: ExitPolicy, variant: Variant = FULL
) -> Future[list[ScoredToken]]:
    """Have a text scored; the future fails where the engine reports a failure."""
    found: Future[list[ScoredToken]] = Future()

    def on_done(outcome: list[ScoredToken] | Event) -> None:
        if isinstance(outcome, list):
            found.set_result(outcome)
        else:
            found.set_exception(ScoreError(outcome))

    bench.count += 1
    bench.engine.score(ScoreRequest(f"s{bench.count}", text, variant, exits), on_done)
    return found


class ScoreError(Exception):
    """A text could not be scored; holds the event that said so."""


def score(bench: Bench, text: tuple[int, ...], exits: ExitPolicy) -> list[ScoredToken]:
    return ask_score(bench, text, exits).result(WAIT_S)


class Begun:
    """The ticks that were begun before their turn, by how many rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.drafting = 0  # rows of them that might have drafted
        begin = Runner._begin

        def counted(runner: Runner, ahead: TickRun, *given: Any) -> bool:
            done = begin(runner, ahead, *given)
            if done:
                self.rows.append(len(ahead.tick.rows))
                self.drafting += sum(row.sequence.drafter is not None for row in ahead.tick.rows)
            return done

        monkeypatch.setattr(Runner, "_begin", counted)


class Taken:
    """The ticks that were passes of the device, by how many rows, and how many of these asked an exit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[tuple[int, int]] = []
        run = DevicePasses.run

        def counted(passes: DevicePasses, under_way: Any, *ahead: Any) -> bool:
            rows, done = under_way.tick.rows, run(passes, under_way, *ahead)
            if done:
                self.rows.append((len(rows), sum(row.threshold is not None for row in rows)))
            return done

        monkeypatch.setattr(DevicePasses, "run", counted)
