"""A benchmark's load on an engine in this process: neither settings nor schemas, and nothing imported of theirs."""

import itertools
import queue
import time
from collections.abc import Callable, Sequence

from exeunt.compression.kv_format import page_bytes_for
from exeunt.compression.memory import free_bytes, named
from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.deploy.bench_load import BenchError, Load, Trace
from exeunt.deploy.bench_text import cut_prompts
from exeunt.server.audit import DEFAULT_SHARE
from exeunt.server.drafting import Drafter
from exeunt.server.engine import Engine
from exeunt.server.engine_config import MAX_OWED, EngineConfig
from exeunt.server.engine_metrics import EngineMetrics
from exeunt.server.request import (
    Event,
    ExitPolicy,
    FailureEvent,
    FinishEvent,
    GenerationRequest,
    SamplingParams,
    StepEvent,
)
from exeunt.server.stage_choice import SchedulingPolicy
from exeunt.server.stage_costs import DraftCosts
from exeunt.server.tick_run import StageRun

_LEAST_TICK = 512  # tokens of one tick, as a server's unless it is told otherwise


class LoadError(ValueError):
    """A load that a model is too short for, or its device too small; one sentence says which and what to do."""


def load_config(
    model: LoadedModel,
    load: Load,
    scheduling: SchedulingPolicy = "run-through",
    *,
    async_scheduling: bool = True,
    max_owed: int = MAX_OWED,
) -> EngineConfig:
    """The engine's limits with room for the load and no more, all else as a server has it unless it is told otherwise.

    Raises LoadError where the model has not that room.
    """
    longest = load.prompt_tokens + load.max_new_tokens
    if longest > model.spec.max_position_embeddings:
        raise LoadError(
            f"--prompt-tokens is {load.prompt_tokens} and --max-new-tokens {load.max_new_tokens}, together {longest}; "
            f"this model's limit is {model.spec.max_position_embeddings}, ask for fewer."
        )
    page_bytes = page_bytes_for(model.spec, model.dtype)
    pages = max(-(-longest // model.kv_layout(each, page_bytes).page_tokens) + 1 for each in model.variants)
    # Room for every client in the largest format: modes are compared by speed, not by who is preempted.
    needed, free = load.concurrency * pages * page_bytes, free_bytes(model.device)
    if needed > free:
        raise LoadError(
            f"--concurrency is {load.concurrency}; so many sequences of {longest} tokens need {needed} bytes of KV "
            f"cache and {named(model.device)} has {free} bytes free, ask for fewer."
        )
    return EngineConfig(
        max_model_len=longest,
        max_num_seqs=load.concurrency,
        max_num_queued_reqs=load.concurrency,
        max_num_batched_tokens=max(_LEAST_TICK, load.concurrency),
        kv_cache_bytes=needed,
        max_owed=max_owed,
        audit_share=DEFAULT_SHARE,
        scheduling=scheduling,
        async_scheduling=async_scheduling,
    )


def server_metrics(model: LoadedModel) -> EngineMetrics:
    """What a server counts by; imports prometheus_client. Counting at every step is part of an engine's speed."""
    from exeunt.server.metrics import Metrics, new_registry

    stages = [str(stage) for stage in range(len(model.exits) + 1)]
    return Metrics(new_registry(), model.name, stages, [head.name for head in model.exits])


class LoadDriver:
    """Runs loads on an engine of its own; `close` ends it."""

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        metrics: EngineMetrics,
        on_stages: Callable[[StageRun], None] | None = None,
        new_drafter: Callable[[GenerationRequest], Drafter] | None = None,
    ) -> None:
        """`on_stages` hears of every run of stages; `new_drafter` is the engine's, None: drafts where they pay."""
        self._model = model
        self._engine = Engine(model, config, metrics, new_drafter=new_drafter, on_stages=on_stages)
        self._engine.start()
        self._numbers = itertools.count()  # `run` may be called by several threads at once

    def close(self) -> None:
        """Stop the engine."""
        self._engine.stop()

    def draft_costs(self, variant: Variant) -> DraftCosts:
        """What the engine takes drafting to cost, by what it has seen."""
        return self._engine.draft_costs(variant)

    def prompts(self, count: int, tokens: int) -> list[list[int]]:
        """Passages of the packaged text."""
        return cut_prompts(
            lambda text: list(self._model.tokenizer.encode(text, verbose=False)), count, tokens
        )

    def run(
        self, prompts: Sequence[Sequence[int]], variant: Variant, exits: ExitPolicy, load: Load
    ) -> list[Trace]:
        """Answer every prompt, `load.concurrency` at a time. Raises BenchError where one fails."""
        ended: queue.SimpleQueue[FailureEvent | None] = queue.SimpleQueue()
        traces: list[Trace] = []
        waiting = list(enumerate(prompts))[::-1]
        under_way = 0
        while waiting or under_way:
            while waiting and under_way < load.concurrency:
                seed, prompt = waiting.pop()
                sampling = SamplingParams(
                    max_new_tokens=load.max_new_tokens,
                    temperature=load.temperature,
                    seed=seed,
                    ignore_eos=True,
                )
                traces.append(self._send(prompt, sampling, variant, exits, ended))
                under_way += 1
            failure = ended.get()
            if failure is not None:
                raise BenchError(f"A request failed: {failure.message}")
            under_way -= 1
        return traces

    def _send(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        variant: Variant,
        exits: ExitPolicy,
        ended: "queue.SimpleQueue[FailureEvent | None]",
    ) -> Trace:
        request = GenerationRequest(
            f"bench-{next(self._numbers)}", tuple(prompt), sampling, variant, exits, arrival=time.monotonic()
        )
        trace = Trace(sent=time.perf_counter())

        def on_event(event: Event) -> None:
            if isinstance(event, StepEvent):
                trace.arrivals.extend([time.perf_counter()] * len(event.tokens))
                trace.ids.extend(token.id for token in event.tokens)
                trace.token_depths.extend(token.depth for token in event.tokens)
                trace.depths += sum(token.depth for token in event.tokens)
                return
            if isinstance(event, FinishEvent):
                depth = event.summary.depth
                trace.by_exit, trace.blocks = depth.by_exit, depth.blocks
                trace.block_passes = depth.block_passes
                trace.drafts, trace.drafts_accepted = depth.drafts, depth.drafts_accepted
            ended.put(event if isinstance(event, FailureEvent) else None)

        self._engine.submit(request, on_event)
        return trace
