"""`exeunt bench`: the speed of every mode, in process on a bundle or over HTTP on a running server.

The load is closed: `concurrency` clients each send their next request when the last is answered. Every mode gets the
same prompts, seeds and lengths. Texts are drawn at temperature 0.8, because greedy loops of small models would make
exits look better than they are.
"""

import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Final, Protocol

import numpy as np
import torch

from exeunt.calibration.risk import percent
from exeunt.deploy.measured_model import MeasuredModel
from exeunt.server.api.offer import Offer

TEMPERATURE: Final = 0.8
_QUANTILES: Final = (0.5, 0.9, 0.99)


class BenchError(RuntimeError):
    """The benchmark cannot go on; one sentence says why."""


@dataclass(frozen=True, slots=True)
class Load:
    """What every mode is put through."""

    concurrency: int = 8
    prompt_tokens: int = 64
    max_new_tokens: int = 64
    requests: int = 32
    temperature: float = TEMPERATURE


@dataclass(frozen=True, slots=True)
class BenchMode:
    """One mode: its name, and the `compression` block that asks for it."""

    name: str
    compression: Mapping[str, Any]


@dataclass(slots=True)
class Trace:
    """One answered request: when it was sent, when each token came (seconds, one clock), at which exit."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    by_exit: dict[str, int] = field(default_factory=dict)
    depths: float = 0.0  # sum over tokens, blocks
    blocks: int = 0


@dataclass(frozen=True, slots=True)
class ModeSpeed:
    """One mode's figures. Quantiles are keyed p50, p90, p99, in seconds."""

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
    """Every variant with exits off, and with exits at each of its certified targets."""
    modes = []
    for variant in sorted(
        offer.variants, key=lambda v: (v.linear_block, v.weights != "full", v.kv_cache != "full")
    ):
        fields, name = asdict(variant), variant.short_name
        modes.append(BenchMode(name, {**fields, "early_exit": False}))
        for target in offer.certified(variant, "propagate"):
            exits = {"mode": "approximate", "max_disagreement": target}
            modes.append(BenchMode(f"{name} exits {percent(target)}", {**fields, "early_exit": exits}))
    return modes


def bench(driver: Driver, modes: Sequence[BenchMode], load: Load) -> Iterator[ModeSpeed]:
    """The speed of each mode in turn, each after a short warm-up. Raises BenchError."""
    prompts = driver.prompts(load.requests, load.prompt_tokens)
    for mode in modes:
        driver.run(prompts[: load.concurrency], mode.compression, load)
        began = time.perf_counter()
        traces = driver.run(prompts, mode.compression, load)
        yield _speed(mode, traces, time.perf_counter() - began)


def _speed(mode: BenchMode, traces: Sequence[Trace], seconds: float) -> ModeSpeed:
    tokens = sum(sum(trace.by_exit.values()) for trace in traces)
    if not tokens:
        raise BenchError(f"No token was generated in mode {mode.name}; ask for more with --max-new-tokens.")
    first = [trace.arrivals[0] - trace.sent for trace in traces if trace.arrivals]
    gaps = [gap for trace in traces for gap in np.diff(trace.arrivals).tolist()]
    final = sum(trace.by_exit.get("final", 0) for trace in traces)
    return ModeSpeed(
        name=mode.name,
        compression=mode.compression,
        tokens_per_second=tokens / seconds,
        tokens=tokens,
        seconds=seconds,
        time_to_first_token_s=_quantiles(first),
        inter_token_latency_s=_quantiles(gaps),
        exit_rate=1 - final / tokens,
        mean_depth=sum(trace.depths for trace in traces) / tokens,
        blocks=max(trace.blocks for trace in traces),
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
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in ("exeunt", "torch", "transformers")},
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
