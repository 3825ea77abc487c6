"""The engine on a tiny real model: what a sequence yields must not depend on anything around it."""

import math
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry
from transformers import LlamaForCausalLM

from exeunt.compression.kv_format import page_bytes_for
from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.server.engine import Engine, EngineStoppedError, QueueFullError, RequestTooLargeError
from exeunt.server.engine_config import EngineConfig
from exeunt.server.metrics import Metrics
from exeunt.server.request import (
    Event,
    ExitPolicy,
    FailureEvent,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    ScoredToken,
    ScoreRequest,
    StepEvent,
)
from exeunt.server.runner import RowResult, Runner
from exeunt.server.scheduler import Scheduler, Tick
from exeunt.server.sequence import Sequence

FULL, INT4_KV, LINEAR = Variant(), Variant(kv_cache="int4"), Variant(linear_block=True)
OFF, LEAVE = ExitPolicy(), ExitPolicy("approximate", threshold=0.5)
PROMPT = tuple(b"The stage is empty. They leave.")
WAIT_S = 60


@dataclass
class Heard:
    """Everything a caller heard of one request."""

    events: list[Event] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    choices: int = 1

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
        **sampling: object,
    ) -> Heard:
        self.count += 1
        heard = Heard(choices=n)
        params = replace(SamplingParams(max_new_tokens=24, ignore_eos=True), **sampling)
        now = time.monotonic()
        deadline = None if timeout_s is None else now + timeout_s
        request = GenerationRequest(f"r{self.count}", prompt, params, variant, exits, n, now, deadline)
        self.engine.submit(request, heard)
        return heard

    def answer(self, **kwargs: object) -> Heard:
        return self.ask(**kwargs).wait()

    def value(self, name: str, **labels: str) -> float:
        return sum(
            sample.value
            for metric in self.registry.collect()
            for sample in metric.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@contextmanager
def running(model: LoadedModel, pages: int = 400, run_through: bool = True, **limits: int) -> Iterator[Bench]:
    registry = CollectorRegistry()
    exits = [f"block_{head.block}" for head in model.exits]
    metrics = Metrics(registry, "tiny", [str(i) for i in range(len(exits) + 1)], exits)
    page_bytes = page_bytes_for(model.spec, model.dtype)
    settings = {"max_model_len": 512, "max_num_batched_tokens": 128, **limits}
    engine = Engine(
        model, EngineConfig(kv_cache_bytes=pages * page_bytes, **settings), metrics, run_through=run_through
    )
    engine.start()
    try:
        yield Bench(engine, registry)
        assert engine.wait_idle(WAIT_S)
        engine.check_integrity()
        snapshot = engine.snapshot()
        assert snapshot.kv_pages_free == snapshot.kv_pages_total
    finally:
        engine.stop()


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
    for i in range(14):
        prompt = tuple(dice.randrange(256) for _ in range(dice.choice((1, 3, 17, 60, 130))))
        asked.append(
            bench.ask(
                prompt=prompt,
                variant=dice.choice((FULL, INT4_KV, LINEAR)),
                exits=dice.choice((OFF, LEAVE)),
                temperature=dice.choice((0.0, 0.8, 1.3)),
                top_p=dice.choice((1.0, 0.9)),
                top_k=dice.choice((0, 20)),
                repetition_penalty=dice.choice((1.0, 1.2)),
                seed=i,
                max_new_tokens=dice.choice((5, 20, 40)),
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
        assert [heard.exits() for heard in other] == [heard.exits() for heard in alone]


def long_prompts(bench: Bench, variant: Variant) -> list[Heard]:
    prompts = [tuple((7 * i + j * j) % 256 for j in range(40)) for i in range(5)]
    asked = [
        bench.ask(prompt=p, variant=variant, exits=LEAVE, max_new_tokens=50, temperature=0.7, seed=i)
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


def score(bench: Bench, text: tuple[int, ...], exits: ExitPolicy) -> list[ScoredToken]:
    done = threading.Event()
    got: list[list[ScoredToken] | Event] = []

    def on_done(outcome: list[ScoredToken] | Event) -> None:
        got.append(outcome)
        done.set()

    bench.engine.score(ScoreRequest("s", text, FULL, exits), on_done)
    assert done.wait(WAIT_S)
    assert isinstance(got[0], list)
    return got[0]


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

    def slow(self: Runner, tick: Tick) -> list[RowResult]:
        time.sleep(0.005)
        return run(self, tick)

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
    assert bench.value("exeunt_request_failure_total", reason="timeout") == 1
    assert bench.value("exeunt_request_success_total", finish_reason="timeout") == 1


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


def test_one_rows_nan_is_no_other_rows_trouble(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = tiny_model.decoder(FULL)
    original = type(decoder).head

    def poisoned(self: object, hidden: torch.Tensor) -> torch.Tensor:
        logits = original(self, hidden)
        if hidden.shape[0] == 3:
            logits[1] = math.nan
        return logits

    with running(tiny_model, max_num_seqs=4) as bench:
        clean = bench.answer(max_new_tokens=30).ids()
        monkeypatch.setattr(type(decoder), "head", poisoned)
        asked = [bench.ask(max_new_tokens=30) for _ in range(3)]
        outcomes = [heard.wait() for heard in asked]
        failed = [heard.events[-1] for heard in outcomes if isinstance(heard.events[-1], FailureEvent)]
        assert len(failed) == 1
        assert failed[0].error_id
        assert all(heard.ids() == clean for heard in outcomes if isinstance(heard.events[-1], FinishEvent))
        monkeypatch.undo()
        assert bench.answer(max_new_tokens=30).ids() == clean


def test_an_exception_in_a_tick_fails_its_requests_and_the_engine_lives_on(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = tiny_model.decoder(FULL)
    with running(tiny_model) as bench:
        monkeypatch.setattr(type(decoder), "head", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        failure = bench.answer().events[-1]
        assert isinstance(failure, FailureEvent)
        assert failure.kind == "internal"
        monkeypatch.undo()
        assert len(bench.answer().ids()) == 24


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
