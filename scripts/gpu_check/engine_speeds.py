"""The engine's tokens per second under one load, warm, in one mode after the other."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.deploy.bench_load import Load
from exeunt.deploy.load_driver import LoadDriver, load_config, server_metrics
from exeunt.server.engine_metrics import Uncounted
from exeunt.server.request import ExitPolicy
from exeunt.server.stage_choice import SchedulingPolicy
from scripts.gpu_check.needs import METRICS, missing
from scripts.gpu_check.report import Context, Found
from scripts.gpu_check.sizes import Sizes

OFF, VERIFIED = ExitPolicy(), ExitPolicy("verified")
HALF = ExitPolicy("approximate", 0.5)
BACKFILLED = ExitPolicy("approximate", 0.5, skipped_kv="backfill")
_MOST_WARM_RUNS = 6
LEAST = 4.0  # seconds left without which a mode is not begun
Modes = Mapping[str, tuple[Variant, ExitPolicy]]
"""By name, a variant and how it exits."""
FULL, INT4 = Variant(), Variant("int4", "int4")


def engine_driver(
    model: LoadedModel,
    load: Load,
    scheduling: SchedulingPolicy = "run-through",
    *,
    async_scheduling: bool = True,
) -> LoadDriver:
    """An engine with room for the load, which counts what it does where this machine can."""
    config = load_config(model, load, scheduling, async_scheduling=async_scheduling)
    return LoadDriver(model, config, Uncounted() if missing(METRICS) else server_metrics(model))


def engine_speeds(
    context: Context,
    found: Found,
    model: LoadedModel,
    driver: LoadDriver,
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
            run = partial(driver.run, prompts[:streams], variant, exits, sizes.load(streams))
            warm = warmed(context, model, run)
            captured = _captured(model)
            began = time.perf_counter()
            traces = run()
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
