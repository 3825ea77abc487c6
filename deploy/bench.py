"""`exeunt bench`: the speed of every mode, in process on a bundle or over HTTP on a running server.

The load is closed: `concurrency` clients each send their next request when the last is answered. Every mode gets the
same prompts, seeds and lengths. Texts are drawn at temperature 0.8, because greedy loops of small models would make
exits and look-ups look better than they are.
"""

import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import groupby
from typing import Any, Final, Literal, Protocol

import numpy as np
import torch

from exeunt.calibration.risk import percent
from exeunt.compression.processor import processor_name
from exeunt.deploy.bench_load import BenchError, Load, Trace
from exeunt.deploy.measured_model import MeasuredModel
from exeunt.server.api.offer import SKIPPED_KV, Offer

INFORMATIVE: Final = 0.1  # where fewer of the tokens leave or are drafted, a ratio says nothing about exits
_QUANTILES: Final = (0.5, 0.9, 0.99)
_ROUNDS: Final = 4  # turns that compared modes take


@dataclass(frozen=True, slots=True)
class BenchMode:
    """One mode: its name, the `compression` block that asks for it, and the mode that its speed is compared with."""

    name: str
    compression: Mapping[str, Any]
    against: str | None = None


@dataclass(frozen=True, slots=True)
class ModeSpeed:
    """One mode's figures. Quantiles are keyed p50, p90, p99, in seconds.

    `ratio` is of tokens per second, to the mode `against` in the same run; "uninformative" where fewer than
    `INFORMATIVE` of the tokens left early or were drafted, None where there is nothing to compare with.
    `passes_saved` is the share of blocks × tokens for which no pass was needed.
    """

    name: str
    compression: Mapping[str, Any]
    tokens_per_second: float
    tokens: int
    seconds: float
    time_to_first_token_s: Mapping[str, float]
    inter_token_latency_s: Mapping[str, float]
    exit_rate: float
    mean_depth: float
    blocks: int
    passes_saved: float
    drafts: int
    drafts_accepted: int
    against: str | None = None
    ratio: float | Literal["uninformative"] | None = None

    @property
    def informative(self) -> bool:
        """Whether enough tokens left early or were drafted for its speed to say something about that."""
        return max(self.exit_rate, self.drafts / self.tokens) >= INFORMATIVE


class Driver(Protocol):
    """Sends requests somewhere and traces their answers."""

    def model(self) -> MeasuredModel:
        """Which model is asked."""
        ...

    def offer(self) -> Offer:
        """What can be asked for."""
        ...

    def prompts(self, count: int, tokens: int) -> list[list[int]]:
        """`count` prompts of `tokens` tokens each."""
        ...

    def run(
        self, prompts: Sequence[Sequence[int]], compression: Mapping[str, Any], load: Load
    ) -> list[Trace]:
        """Answer every prompt under `compression`, `load.concurrency` at a time."""
        ...


def modes_of(offer: Offer) -> list[BenchMode]:
    """Every variant with exits off, verified, and at each of its certified targets, by backfill and by propagation."""
    modes = []
    for variant in sorted(
        offer.variants, key=lambda v: (v.linear_block, v.weights != "full", v.kv_cache != "full")
    ):
        fields, name = asdict(variant), variant.short_name
        modes.append(BenchMode(name, {**fields, "early_exit": False}))
        if "verified" in offer.modes:
            modes.append(BenchMode(f"{name} verified", {**fields, "early_exit": True}, name))
        for skipped_kv in SKIPPED_KV:
            for target in offer.certified(variant, skipped_kv):
                exits = {"mode": "approximate", "max_disagreement": target, "skipped_kv": skipped_kv}
                called = f"{name} exits {percent(target)} {skipped_kv}"
                modes.append(BenchMode(called, {**fields, "early_exit": exits}, name))
    return modes


def bench(driver: Driver, modes: Sequence[BenchMode], load: Load) -> Iterator[ModeSpeed]:
    """The speed of each mode, each after a short warm-up. Raises BenchError.

    Modes that are compared with each other take turns, a share of the requests each, so that what else the machine
    does meets them alike.
    """
    prompts = driver.prompts(load.requests, load.prompt_tokens)
    share = max(load.concurrency, -(-len(prompts) // _ROUNDS))
    for group in _compared(modes):
        traces: list[list[Trace]] = [[] for _ in group]
        seconds = [0.0] * len(group)
        for mode in group:
            driver.run(prompts[: load.concurrency], mode.compression, load)
        for start in range(0, len(prompts), share):
            for place, mode in enumerate(group):
                began = time.perf_counter()
                traces[place] += driver.run(prompts[start : start + share], mode.compression, load)
                seconds[place] += time.perf_counter() - began
        speeds = [_speed(*measured) for measured in zip(group, traces, seconds, strict=True)]
        found = {speed.name: speed for speed in speeds}
        yield from (replace(speed, ratio=_ratio(speed, found)) for speed in speeds)


def _compared(modes: Sequence[BenchMode]) -> Iterator[list[BenchMode]]:
    """The modes in order, those together that are compared with the same one, and it."""
    for _, group in groupby(modes, key=lambda mode: mode.against or mode.name):
        yield list(group)


def _ratio(speed: ModeSpeed, found: Mapping[str, ModeSpeed]) -> float | Literal["uninformative"] | None:
    if speed.against is None or speed.against not in found:
        return None
    if not speed.informative:
        return "uninformative"
    return speed.tokens_per_second / found[speed.against].tokens_per_second


def _speed(mode: BenchMode, traces: Sequence[Trace], seconds: float) -> ModeSpeed:
    tokens = sum(sum(trace.by_exit.values()) for trace in traces)
    if not tokens:
        raise BenchError(f"No token was generated in mode {mode.name}; ask for more with --max-new-tokens.")
    first = [trace.arrivals[0] - trace.sent for trace in traces if trace.arrivals]
    gaps = [gap for trace in traces for gap in np.diff(trace.arrivals).tolist()]
    final = sum(trace.by_exit.get("final", 0) for trace in traces)
    blocks = max(trace.blocks for trace in traces)
    return ModeSpeed(
        name=mode.name,
        compression=mode.compression,
        tokens_per_second=tokens / seconds,
        tokens=tokens,
        seconds=seconds,
        time_to_first_token_s=_quantiles(first),
        inter_token_latency_s=_quantiles(gaps),
        exit_rate=(tokens - final) / tokens,
        mean_depth=sum(trace.depths for trace in traces) / tokens,
        blocks=blocks,
        passes_saved=1 - sum(trace.block_passes for trace in traces) / (tokens * blocks),
        drafts=sum(trace.drafts for trace in traces),
        drafts_accepted=sum(trace.drafts_accepted for trace in traces),
        against=mode.against,
    )


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    found = np.quantile(np.asarray(values), _QUANTILES)
    return {f"p{round(q * 100)}": float(value) for q, value in zip(_QUANTILES, found, strict=True)}


def bench_record(
    target: str, model: MeasuredModel, load: Load, speeds: Sequence[ModeSpeed]
) -> dict[str, Any]:
    """The result as JSON: which model was measured, under which load, on which machine, with which versions."""
    return {
        "target": target,
        "model": asdict(model),
        "load": asdict(load),
        "machine": machine(),
        "modes": [asdict(speed) for speed in speeds],
    }


def machine() -> dict[str, Any]:
    """What a speed depends on: the processor, how much of it is used, the system, the versions."""
    return {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in ("exeunt", "torch", "transformers")},
    }
