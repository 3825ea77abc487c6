"""Timed generations of the packaged model by the engine, and the file that holds a benchmark's result."""

import itertools
import json
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from exeunt.compression.model import LoadedModel, load_bundle
from exeunt.compression.variant import SkippedKV, Variant
from exeunt.deploy.bench import machine
from exeunt.deploy.bench_engine import EngineDriver, engine_driver
from exeunt.deploy.bench_load import Load
from exeunt.deploy.measured_model import measured_model
from exeunt.deploy.packaged import packaged_bundle
from exeunt.server.engine_config import MAX_OWED
from exeunt.server.stage_choice import SchedulingPolicy
from exeunt.server.stage_costs import DraftCosts
from exeunt.server.tick_run import StageRun

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
VARIANTS = {"full weights": Variant(), "INT4 weights and KV": Variant("int4", "int4")}
OFF = {"mode": "off"}
MANY = 4  # the engine has room for so many times the streams

Prompts = Sequence[Sequence[int]]
Out = Annotated[Path | None, typer.Option(help="where the JSON goes")]
Count = Annotated[int, typer.Option(min=1)]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much a benchmark runs: lengths in tokens, requests at once, repeats of everything timed."""

    prompt_tokens: int
    new_tokens: int
    repeats: int
    streams: int


@dataclass(frozen=True, slots=True)
class Run:
    """One timed generation: all requests submitted at once, until the last token."""

    tokens: int
    seconds: float
    exit_rate: float = 0.0
    skipped: float = 0.0  # the share of the blocks behind a token's exit, of all block × token pairs
    passes_share: float = 1.0  # blocks that requests took part in, of tokens × blocks
    drafts: int = 0
    drafts_accepted: int = 0
    by_exit: Mapping[str, int] = field(default_factory=dict)
    stage_runs: Sequence[StageRun] = ()
    answers: Sequence[Sequence[int]] = ()  # each prompt's new tokens

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class EngineRuns:
    """Our engine on the loaded bundle, the load of `exeunt bench`."""

    def __init__(
        self,
        model: LoadedModel,
        driver: EngineDriver,
        load: Load,
        bundle: Path,
        stage_runs: list[StageRun],
    ) -> None:
        """`bundle` is the loaded model's; `stage_runs` is what the engine's runs of stages are appended to."""
        self.model, self.bundle = model, bundle
        self._driver, self._load, self._stage_runs = driver, load, stage_runs
        self._prompts = driver.prompts(load.concurrency, load.prompt_tokens)

    def prompts(self, count: int) -> Prompts:
        """The first `count` of the prompts, the same in every benchmark of the same sizes."""
        return self._prompts[:count]

    def certified(self, variant: Variant, skipped_kv: SkippedKV = "propagate") -> dict[float, float]:
        """The certified targets of a variant and their thresholds."""
        return self._driver.offer().certified(variant, skipped_kv)

    def draft_costs(self, variant: Variant) -> DraftCosts:
        """What the engine takes drafting to cost, by what it has seen."""
        return self._driver.draft_costs(variant)

    def at_once(self, prompts: Prompts, variant: Variant, early_exit: Mapping[str, Any] = OFF) -> Run:
        """Submit all prompts together and wait for the last token."""
        compression = {**asdict(variant), "early_exit": early_exit}
        self._stage_runs.clear()
        began = time.perf_counter()
        traces = self._driver.run(prompts, compression, self._load)
        seconds = time.perf_counter() - began
        tokens = sum(sum(trace.by_exit.values()) for trace in traces)
        by_exit: Counter[str] = sum((Counter(trace.by_exit) for trace in traces), Counter())
        pairs = tokens * traces[0].blocks
        return Run(
            tokens,
            seconds,
            exit_rate=1 - by_exit["final"] / tokens,
            skipped=1 - sum(trace.depths for trace in traces) / pairs,
            passes_share=sum(trace.block_passes for trace in traces) / pairs,
            drafts=sum(trace.drafts for trace in traces),
            drafts_accepted=sum(trace.drafts_accepted for trace in traces),
            by_exit=dict(by_exit),
            stage_runs=tuple(self._stage_runs),
            answers=[trace.ids for trace in traces],
        )

    def gaps(self, prompts: Prompts, variant: Variant, beside: Prompts = ()) -> list[float]:
        """Seconds between an answer's tokens with exits off, while `beside` are read in one after the other, over and
        over."""
        compression = {**asdict(variant), "early_exit": OFF}
        done = threading.Event()

        def read_in() -> None:
            for prompt in itertools.cycle(beside):
                if done.is_set():
                    return
                self._driver.run([prompt], compression, replace(self._load, max_new_tokens=1, concurrency=1))

        reader = threading.Thread(target=read_in)
        reader.start()
        try:
            traces = self._driver.run(prompts, compression, replace(self._load, concurrency=len(prompts)))
        finally:
            done.set()
            reader.join()
        return [later - before for trace in traces for before, later in itertools.pairwise(trace.arrivals)]


def in_turn(
    ours: Callable[[], Run], theirs: Callable[[], Run], repeats: int
) -> tuple[dict[str, Any], list[tuple[Run, Run]]]:
    """Both in turn, `repeats` times after a warm-up of each: medians, the median of the pairwise ratios, the pairs."""
    ours()
    theirs()
    pairs = [(ours(), theirs()) for _ in range(repeats)]
    ratios = [a.speed / b.speed for a, b in pairs]
    row = {
        "repeats": repeats,
        "tokens_per_s": statistics.median(a.speed for a, _ in pairs),
        "against_tokens_per_s": statistics.median(b.speed for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    return row, pairs


@contextmanager
def packaged_runs(
    sizes: Sizes,
    scheduling: SchedulingPolicy = "run-through",
    changed: Callable[[LoadedModel], LoadedModel] = lambda model: model,
    max_owed: int = MAX_OWED,
) -> Iterator[EngineRuns]:
    """An engine on the packaged bundle, `changed`, greedy, float32, with room for `MANY` times the streams."""
    bundle = packaged_bundle()
    model = changed(load_bundle(bundle, device="cpu", dtype=torch.float32, weights="both"))
    many = MANY * sizes.streams
    load = Load(many, sizes.prompt_tokens, sizes.new_tokens, many, temperature=0.0)
    stage_runs: list[StageRun] = []
    driver = engine_driver(model, load, scheduling, stage_runs.append, max_owed)
    try:
        yield EngineRuns(model, driver, load, bundle, stage_runs)
    finally:
        driver.close()


def write_result(path: Path, model: LoadedModel, sizes: Sizes, **rest: Any) -> None:
    """Write JSON: which model was measured, on which machine, how much of it, and what came out."""
    about = {"model": asdict(measured_model(model)), "machine": machine(), "settings": asdict(sizes)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | rest, indent=2) + "\n")
