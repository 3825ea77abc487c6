"""The engine's tokens per second under one load, warm, in one mode after the other, and what it holds meanwhile.

"kv_bytes_per_sequence" are of the pages that the warm load held at most, over its streams; beside it stands what the
layout of the pages says of a sequence of its length.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.deploy.bench_load import Load, Trace
from exeunt.deploy.load_driver import LoadError, load_config, server_metrics
from exeunt.server.drafting import Drafter
from exeunt.server.engine_metrics import Uncounted
from exeunt.server.request import ExitPolicy, GenerationRequest
from exeunt.server.stage_choice import SchedulingPolicy
from scripts.gpu_check.held_memory import watched_memory
from scripts.gpu_check.needs import METRICS, missing
from scripts.gpu_check.paged_loads import PagedLoads, paged_bytes
from scripts.gpu_check.report import Context, Found
from scripts.gpu_check.room import LACKING, within_memory
from scripts.gpu_check.sizes import Sizes

OFF, VERIFIED = ExitPolicy(), ExitPolicy("verified")
HALF = ExitPolicy("approximate", 0.5)
BACKFILLED = ExitPolicy("approximate", 0.5, skipped_kv="backfill")
_MOST_WARM_RUNS = 6
LEAST = 4.0  # seconds left without which a mode is not begun
Modes = Mapping[str, tuple[Variant, ExitPolicy]]
"""By name, a variant and how it exits."""
FULL, INT4 = Variant(), Variant("int4", "int4")
LINEAR = Variant("int4", "int4", linear_block=True)
NO_ROOM = (*LACKING, LoadError)
"""What says that a device is too small for a load."""


def engine_driver(
    model: LoadedModel,
    load: Load,
    scheduling: SchedulingPolicy = "run-through",
    *,
    async_scheduling: bool = True,
    cuda_graphs: bool = True,
    new_drafter: Callable[[GenerationRequest], Drafter] | None = None,
) -> PagedLoads:
    """An engine with room for the load, which counts what it does where this machine can. Raises LoadError.

    `new_drafter` makes what drafts for an answer in the verified mode, None: where drafts pay.
    """
    config = load_config(model, load, scheduling, async_scheduling=async_scheduling)
    config = replace(config, cuda_graphs=cuda_graphs)
    return PagedLoads(model, config, Uncounted() if missing(METRICS) else server_metrics(model), new_drafter)


def engine_speeds(
    context: Context,
    found: Found,
    model: LoadedModel,
    driver: PagedLoads,
    prompts: Sequence[Sequence[int]],
    modes: Modes,
    sizes: Sizes,
    least: float = LEAST,
) -> None:
    """Tokens per second of every number of streams and mode, once a load has captured all of its graphs.

    No mode is begun with fewer than `least` seconds left.
    """
    for streams in sizes.streams:
        for name, (variant, exits) in modes.items():
            called = f"engine {name}, {streams} streams"
            if not context.fits(least, called, found):
                continue
            with within_memory(context, called, found, NO_ROOM):
                load = partial(driver.run, prompts[:streams], variant, exits, sizes.load(streams))
                found[called] = _speed(context, model, driver, load, streams)
                pages = paged_bytes(model, variant, driver.page_bytes, sizes.prompt + sizes.answer)
                found[called]["kv_bytes_by_layout"] = pages
                context.report.save()


def _speed(
    context: Context, model: LoadedModel, driver: PagedLoads, run: Callable[[], list[Trace]], streams: int
) -> Found:
    """The figures of a load, once it is warm."""
    driver.watch()
    warm = warmed(context, model, run)
    pages = driver.most_pages()
    captured = _captured(model)
    began = time.perf_counter()
    traces, held = watched_memory(context, run)
    seconds = time.perf_counter() - began
    tokens = sum(len(trace.ids) for trace in traces)
    first = max(trace.arrivals[0] - trace.sent for trace in traces)
    return {
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
        "seconds_to_last_first_token": first,
        "decode_tokens_per_s": (tokens - streams) / max(seconds - first, 1e-9),
        "exit_rate": 1 - sum(trace.by_exit.get("final", 0) for trace in traces) / tokens,
        "drafts": sum(trace.drafts for trace in traces),
        "drafts_accepted": sum(trace.drafts_accepted for trace in traces),
        "warm_runs": warm,
        "captured_while_timed": _captured(model) - captured,
        "kv_bytes_per_sequence": pages * driver.page_bytes / streams,
        **held,
    }


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
