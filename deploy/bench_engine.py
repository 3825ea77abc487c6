"""The benchmark's load on an engine in this process: no HTTP, the server's own ceiling."""

import itertools
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from exeunt.compression.kv_format import page_bytes_for
from exeunt.compression.memory import free_bytes, named
from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.deploy.bench import BenchError, Load, Trace
from exeunt.deploy.bench_text import cut_prompts
from exeunt.deploy.loading import SettingsError, engine_config
from exeunt.deploy.measured_model import MeasuredModel, measured_model
from exeunt.server.api.compression import AppliedCompression, resolve
from exeunt.server.api.offer import Offer, offer_of
from exeunt.server.api.schemas import CompressionOptions
from exeunt.server.engine import Engine
from exeunt.server.engine_config import MAX_OWED, EngineConfig
from exeunt.server.metrics import Metrics, new_registry
from exeunt.server.request import (
    Event,
    FailureEvent,
    FinishEvent,
    GenerationRequest,
    SamplingParams,
    StepEvent,
)
from exeunt.server.settings import given_settings
from exeunt.server.stage_choice import SchedulingPolicy
from exeunt.server.stage_costs import DraftCosts
from exeunt.server.tick_run import StageRun


def engine_driver(
    model: LoadedModel,
    load: Load,
    scheduling: SchedulingPolicy = "run-through",
    on_stages: Callable[[StageRun], None] | None = None,
    max_owed: int = MAX_OWED,
    *,
    async_scheduling: bool = True,
    spare: bool = False,
) -> "EngineDriver":
    """An engine with room for the load; `on_stages` hears of every run of stages, what follows is EngineConfig's.

    With `spare` it takes no more memory for keys and values than that: others may be at work beside it. Raises
    SettingsError where the model has not that room.
    """
    longest = load.prompt_tokens + load.max_new_tokens
    if longest > model.spec.max_position_embeddings:
        raise SettingsError(
            f"--prompt-tokens is {load.prompt_tokens} and --max-new-tokens {load.max_new_tokens}, together {longest}; "
            f"this model's limit is {model.spec.max_position_embeddings}, ask for fewer."
        )
    settings = given_settings(
        {
            "max_model_len": longest,
            "max_num_seqs": load.concurrency,
            "max_num_queued_reqs": load.concurrency,
            "max_num_batched_tokens": max(512, load.concurrency),
            "scheduling": scheduling,
            "async_scheduling": async_scheduling,
        }
    )
    config = engine_config(model, settings)
    page_bytes = page_bytes_for(model.spec, model.dtype)
    pages = max(-(-longest // model.kv_layout(each, page_bytes).page_tokens) + 1 for each in model.variants)
    # Room for every client in the largest format: modes are compared by speed, not by who is preempted.
    needed, free = load.concurrency * pages * page_bytes, free_bytes(model.device)
    if needed > free:
        raise SettingsError(
            f"--concurrency is {load.concurrency}; so many sequences of {longest} tokens need {needed} bytes of KV "
            f"cache and {named(model.device)} has {free} bytes free, ask for fewer."
        )
    held = needed if spare else max(config.kv_cache_bytes, needed)
    return EngineDriver(model, replace(config, kv_cache_bytes=held, max_owed=max_owed), on_stages)


class EngineDriver:
    """Runs the load on an engine of its own; `close` ends it."""

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        on_stages: Callable[[StageRun], None] | None = None,
    ) -> None:
        self._model, self._config = model, config
        self._offer = offer_of(model)
        stages = [str(stage) for stage in range(len(model.exits) + 1)]
        metrics = Metrics(new_registry(), model.name, stages, self._offer.exits)
        self._engine = Engine(model, config, metrics, on_stages=on_stages)
        self._engine.start()
        self._numbers = itertools.count()  # `run` may be called by several threads at once

    def close(self) -> None:
        """Stop the engine."""
        self._engine.stop()

    def model(self) -> MeasuredModel:
        """Which model the engine runs. Raises BundleError where a plain checkpoint's files cannot be read."""
        return measured_model(self._model)

    def draft_costs(self, variant: Variant) -> DraftCosts:
        """What the engine takes drafting to cost, by what it has seen."""
        return self._engine.draft_costs(variant)

    def offer(self) -> Offer:
        """What the model offers."""
        return self._offer

    def prompts(self, count: int, tokens: int) -> list[list[int]]:
        """Passages of the packaged text."""
        return cut_prompts(
            lambda text: list(self._model.tokenizer.encode(text, verbose=False)), count, tokens
        )

    def run(
        self, prompts: Sequence[Sequence[int]], compression: Mapping[str, Any], load: Load
    ) -> list[Trace]:
        """Answer every prompt, `load.concurrency` at a time. Raises BenchError where one fails."""
        applied = resolve(CompressionOptions.model_validate(compression), CompressionOptions(), self._offer)
        ended: queue.SimpleQueue[FailureEvent | None] = queue.SimpleQueue()
        traces: list[Trace] = []
        waiting = list(enumerate(prompts))[::-1]
        under_way = 0
        while waiting or under_way:
            while waiting and under_way < load.concurrency:
                seed, prompt = waiting.pop()
                traces.append(self._send(prompt, seed, applied, load, ended))
                under_way += 1
            failure = ended.get()
            if failure is not None:
                raise BenchError(f"A request failed: {failure.message}")
            under_way -= 1
        return traces

    def _send(
        self,
        prompt: Sequence[int],
        seed: int,
        applied: AppliedCompression,
        load: Load,
        ended: "queue.SimpleQueue[FailureEvent | None]",
    ) -> Trace:
        sampling = SamplingParams(
            max_new_tokens=load.max_new_tokens, temperature=load.temperature, seed=seed, ignore_eos=True
        )
        request = GenerationRequest(
            f"bench-{next(self._numbers)}",
            tuple(prompt),
            sampling,
            applied.variant,
            applied.exits,
            arrival=time.monotonic(),
        )
        trace = Trace(sent=time.perf_counter())

        def on_event(event: Event) -> None:
            if isinstance(event, StepEvent):
                trace.arrivals.extend([time.perf_counter()] * len(event.tokens))
                trace.ids.extend(token.id for token in event.tokens)
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
