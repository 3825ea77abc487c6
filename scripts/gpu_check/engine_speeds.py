"""The engine's tokens per second under one load, warm, in one mode after the other."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.deploy.bench import Load
from exeunt.deploy.bench_engine import EngineDriver
from scripts.gpu_check.report import Context, Found

OFF: Mapping[str, Any] = {"mode": "off"}
VERIFIED: Mapping[str, Any] = {"mode": "verified"}
HALF: Mapping[str, Any] = {"mode": "approximate", "threshold": 0.5, "skipped_kv": "propagate"}
BACKFILLED: Mapping[str, Any] = {**HALF, "skipped_kv": "backfill"}
_MOST_WARM_RUNS = 6
LEAST = 4.0  # seconds left without which a mode is not begun
Modes = Mapping[str, tuple[Variant, Mapping[str, Any]]]
"""By name, a variant and how it exits."""
FULL, INT4 = Variant(), Variant("int4", "int4")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Streams at once, the most wanted number first, and tokens of each prompt and answer."""

    streams: tuple[int, ...]
    prompt: int
    answer: int

    @property
    def most(self) -> int:
        """The most streams."""
        return max(self.streams)

    def load(self, streams: int, answer: int | None = None, temperature: float = 0.0) -> Load:
        """The load of so many streams."""
        return Load(streams, self.prompt, answer or self.answer, streams, temperature)


def engine_speeds(
    context: Context,
    found: Found,
    model: LoadedModel,
    driver: EngineDriver,
    prompts: Sequence[Sequence[int]],
    modes: Modes,
    sizes: Sizes,
) -> None:
    """Tokens per second of every number of streams and mode, once a load has captured all of its graphs."""
    for streams in sizes.streams:
        for name, (variant, exits) in modes.items():
            called = f"engine {name}, {streams} streams"
            if not context.fits(LEAST, called, found):
                continue
            ask, load = {**asdict(variant), "early_exit": exits}, sizes.load(streams)
            warm = warmed(context, model, partial(driver.run, prompts[:streams], ask, load))
            captured = _captured(model)
            began = time.perf_counter()
            traces = driver.run(prompts[:streams], ask, load)
            seconds = time.perf_counter() - began
            tokens = sum(len(trace.ids) for trace in traces)
            first = max(trace.arrivals[0] - trace.sent for trace in traces)
            found[called] = {
                "tokens_per_s": tokens / seconds,
                "seconds": seconds,
                "seconds_to_last_first_token": first,
                "decode_tokens_per_s": (tokens - streams) / max(seconds - first, 1e-9),
                "exit_rate": 1 - sum(trace.by_exit.get("final", 0) for trace in traces) / tokens,
                "drafts": sum(trace.drafts for trace in traces),
                "drafts_accepted": sum(trace.drafts_accepted for trace in traces),
                "warm_runs": warm,
                "captured_while_timed": _captured(model) - captured,
            }
            context.report.save()


def warmed(context: Context, model: LoadedModel, run: Callable[[], object]) -> int:
    """Runs made until one captured no CUDA graph; not more than a few, nor beyond the time."""
    for made in range(1, _MOST_WARM_RUNS + 1):
        before, began = _captured(model), time.perf_counter()
        run()
        if _captured(model) == before or context.clock.left() < 2 * (time.perf_counter() - began):
            return made
    return _MOST_WARM_RUNS


def _captured(model: LoadedModel) -> int:
    """CUDA graphs that the model's decoders have captured."""
    graphs = {id(each.step_graphs): each.step_graphs for each in model.decoders.values()}
    return sum(each.pool.count for each in graphs.values() if each is not None)


def free_memory(context: Context) -> None:
    gc.collect()
    if context.cuda:
        torch.cuda.empty_cache()
