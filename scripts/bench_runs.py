"""Timed generations of the engine: what the benchmarks compare."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exeunt.compression.variant import Variant
from exeunt.deploy.bench import Load
from exeunt.deploy.bench_engine import EngineDriver

OFF = {"mode": "off"}

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Run:
    """One timed generation: all requests submitted at once, until the last token."""

    tokens: int
    seconds: float
    exit_rate: float = 0.0
    skipped: float = 0.0  # the share of block × token pairs that were never computed

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class EngineRuns:
    """Our engine on the loaded bundle, the load of `exeunt bench`."""

    def __init__(self, driver: EngineDriver, load: Load) -> None:
        self._driver, self._load = driver, load

    def certified(self, variant: Variant) -> dict[float, float]:
        """The certified targets of a variant and their thresholds."""
        return self._driver.offer().certified(variant, "propagate")

    def at_once(self, prompts: Prompts, variant: Variant, early_exit: Mapping[str, Any] = OFF) -> Run:
        """Submit all prompts together and wait for the last token."""
        compression = {
            "weights": variant.weights,
            "kv_cache": variant.kv_cache,
            "linear_block": variant.linear_block,
            "early_exit": early_exit,
        }
        began = time.perf_counter()
        traces = self._driver.run(prompts, compression, self._load)
        seconds = time.perf_counter() - began
        tokens = sum(sum(trace.by_exit.values()) for trace in traces)
        final = sum(trace.by_exit.get("final", 0) for trace in traces)
        passed = sum(trace.depths for trace in traces)
        return Run(tokens, seconds, 1 - final / tokens, 1 - passed / (tokens * traces[0].blocks))
