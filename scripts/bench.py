"""Measures the packaged model beside `transformers` in one run and writes JSON: what `make bench` calls.

Every ratio is taken pair by pair (ours and theirs in turn), and the median over the repeats is quoted, so that a
drifting machine moves both sides. Tokens are greedy, end-of-text is ignored, prompts come from the calibration text.
"""

import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.table import Table

from exeunt.compression.model import LoadedModel, load_bundle
from exeunt.compression.variant import Variant
from exeunt.deploy import packaged_model
from exeunt.deploy.packaged import packaged_bundle
from exeunt.server.engine import Engine
from exeunt.server.engine_config import EngineConfig
from exeunt.server.metrics import Metrics
from exeunt.server.request import (
    Event,
    ExitPolicy,
    FailureEvent,
    FinishEvent,
    GenerationRequest,
    SamplingParams,
)

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
INFORMATIVE = 0.10  # a share of tokens that left below this says nothing about the speed of exits
FULL, SMALL = Variant(), Variant("int4", "int4")

console = Console()


@dataclass(frozen=True, slots=True)
class Run:
    """One timed generation: all requests submitted at once, until the last token."""

    tokens: int
    seconds: float
    left_early: int = 0  # tokens that left before the last block
    blocks_executed: int = 0
    blocks: int = 0

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def exit_rate(self) -> float:
        return self.left_early / self.tokens

    @property
    def skipped(self) -> float:
        """The share of block × token pairs that were never computed."""
        return 1 - self.blocks_executed / (self.tokens * self.blocks) if self.blocks else 0.0


def main(
    out: Annotated[Path | None, typer.Option(help="where the JSON goes")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 32,
    new_tokens: Annotated[int, typer.Option(min=1)] = 96,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    streams: Annotated[int, typer.Option(min=1)] = 8,
) -> None:
    """Measure, print a table, write JSON."""
    bundle = packaged_bundle()
    model = load_bundle(bundle, device="cpu", dtype=torch.float32, weights="both")
    prompts = _prompts(model, streams, prompt_tokens)
    reference = _Transformers(packaged_model.path())
    with _Running(model, prompt_tokens + new_tokens) as ours:
        rows = _measure(ours, reference, prompts, new_tokens, repeats)
        rows |= _measure_exits(ours, model, prompts, new_tokens, repeats)
    result = {
        "machine": _machine(),
        "settings": {
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "repeats": repeats,
            "streams": streams,
        },
        "results": rows,
    }
    path = out or RESULTS / "packaged-cpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    _print(rows)
    console.print(f"written to {path}")


class _Transformers:
    """`transformers` generate on the same checkpoint, float32, greedy."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def one_after_another(self, prompts: list[list[int]], new_tokens: int) -> Run:
        began, tokens = time.perf_counter(), 0
        for prompt in prompts:
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                answer = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
            tokens += answer.shape[1] - ids.shape[1]
        return Run(tokens, time.perf_counter() - began)


class _Running:
    """Our engine on the loaded bundle."""

    def __init__(self, model: LoadedModel, most_tokens: int) -> None:
        config = EngineConfig(max_model_len=min(model.spec.max_position_embeddings, most_tokens))
        stages = [f"stage_{i}" for i in range(len(model.exits) + 1)]
        metrics = Metrics(CollectorRegistry(), model.name, stages, [f"block_{e.block}" for e in model.exits])
        self._engine = Engine(model, config, metrics)
        self._count = 0

    def __enter__(self) -> "_Running":
        self._engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.stop()

    def at_once(self, prompts: list[list[int]], new_tokens: int, variant: Variant, exits: ExitPolicy) -> Run:
        """Submit all prompts together and wait for the last token."""
        finished: list[FinishEvent] = []
        failed: list[FailureEvent] = []
        left = threading.Semaphore(0)

        def on_event(event: Event) -> None:
            if isinstance(event, FinishEvent):
                finished.append(event)
                left.release()
            elif isinstance(event, FailureEvent):
                failed.append(event)
                left.release()

        began = time.perf_counter()
        for prompt in prompts:
            self._count += 1
            sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
            request = GenerationRequest(
                f"bench-{self._count}", tuple(prompt), sampling, variant, exits, arrival=time.monotonic()
            )
            self._engine.submit(request, on_event)
        for _ in prompts:
            left.acquire()
        seconds = time.perf_counter() - began
        if failed:
            raise RuntimeError(f"a request failed: {failed[0].message}")
        tokens = sum(event.summary.completion_tokens for event in finished)
        depth = [event.summary.depth for event in finished]
        return Run(
            tokens,
            seconds,
            left_early=tokens - sum(d.by_exit.get("final", 0) for d in depth),
            blocks_executed=sum(d.blocks_executed for d in depth),
            blocks=depth[0].blocks,
        )


def _measure(
    ours: _Running, reference: _Transformers, prompts: list[list[int]], new_tokens: int, repeats: int
) -> dict[str, Any]:
    one, off = prompts[:1], ExitPolicy()
    return {
        "one stream, full weights, against generate": _pair(
            lambda: ours.at_once(one, new_tokens, FULL, off),
            lambda: reference.one_after_another(one, new_tokens),
            repeats,
        ),
        "one stream, INT4 weights and KV, against generate": _pair(
            lambda: ours.at_once(one, new_tokens, SMALL, off),
            lambda: reference.one_after_another(one, new_tokens),
            repeats,
        ),
        f"{len(prompts)} streams, full weights, against as many generate calls in turn": _pair(
            lambda: ours.at_once(prompts, new_tokens, FULL, off),
            lambda: reference.one_after_another(prompts, new_tokens),
            repeats,
        ),
        f"{len(prompts)} streams, INT4 weights and KV, against as many generate calls in turn": _pair(
            lambda: ours.at_once(prompts, new_tokens, SMALL, off),
            lambda: reference.one_after_another(prompts, new_tokens),
            repeats,
        ),
    }


def _measure_exits(
    ours: _Running, model: LoadedModel, prompts: list[list[int]], new_tokens: int, repeats: int
) -> dict[str, Any]:
    """Exits on against off, at the loosest certified target and at a threshold where enough tokens leave."""
    rows: dict[str, Any] = {}
    for name, asked in (("one stream", prompts[:1]), (f"{len(prompts)} streams", prompts)):
        for label, variant in (("full weights", FULL), ("INT4 weights and KV", SMALL)):
            for what, policy in _policies(ours, model, variant, asked, new_tokens):
                rows[f"{name}, {label}, exits {what}, against exits off"] = _pair(
                    partial(ours.at_once, asked, new_tokens, variant, policy),
                    partial(ours.at_once, asked, new_tokens, variant, ExitPolicy()),
                    repeats,
                )
    return rows


def _policies(
    ours: _Running, model: LoadedModel, variant: Variant, prompts: list[list[int]], new_tokens: int
) -> list[tuple[str, ExitPolicy]]:
    found: list[tuple[str, ExitPolicy]] = []
    certified = _certified(model, variant)
    if certified:
        target = max(certified)
        policy = ExitPolicy("approximate", certified[target], target, "propagate")
        found.append((f"at the certified target {target:g}", policy))
        if ours.at_once(prompts, new_tokens, variant, policy).exit_rate >= INFORMATIVE:
            return found
    for threshold in (0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3):
        policy = ExitPolicy("approximate", threshold, None, "propagate")
        if ours.at_once(prompts, new_tokens, variant, policy).exit_rate >= INFORMATIVE:
            found.append((f"at threshold {threshold:g} (not certified)", policy))
            break
    return found


def _certified(model: LoadedModel, variant: Variant) -> dict[float, float]:
    """The certified targets of a variant and their thresholds."""
    entries = model.manifest.risk_table if model.manifest is not None else ()
    return {
        line.target: line.threshold
        for entry in entries
        if entry.variant == variant and entry.skipped_kv == "propagate"
        for line in entry.targets
        if line.certified and line.threshold is not None
    }


def _pair(ours: Callable[[], Run], theirs: Callable[[], Run], repeats: int) -> dict[str, Any]:
    """Both in turn, `repeats` times after a warm-up of each; medians, and the median of the pairwise ratios."""
    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(repeats)]
    ratios = [a.speed / b.speed for a, b in pairs]
    mine = [a for a, _ in pairs]
    row: dict[str, Any] = {
        "tokens_per_s": statistics.median(a.speed for a in mine),
        "against_tokens_per_s": statistics.median(b.speed for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    if mine[0].left_early:
        skipped = statistics.median(a.skipped for a in mine)
        row |= {"exit_rate": statistics.median(a.exit_rate for a in mine), "blocks_skipped_share": skipped}
        row["informative"] = row["exit_rate"] >= INFORMATIVE
        row["gain_over_skipped_share"] = (row["ratio"] - 1) / skipped
    return row


def _prompts(model: LoadedModel, count: int, tokens: int) -> list[list[int]]:
    text = (packaged_model.path() / "calibration.txt").read_text(encoding="utf-8")[: 200 * tokens * count]
    ids = list(model.tokenizer(text)["input_ids"])
    step = max(len(ids) // count, tokens)
    prompts = [ids[i * step : i * step + tokens] for i in range(count)]
    if any(len(prompt) < tokens for prompt in prompts):
        raise typer.BadParameter(f"the calibration text is too short for {count} prompts of {tokens} tokens")
    return prompts


def _machine() -> dict[str, Any]:
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in ("exeunt", "torch", "transformers")},
    }


def _print(rows: dict[str, Any]) -> None:
    table = Table("what", "tokens/s", "against", "ratio", "min–max", "exit rate", "blocks skipped")
    for name, row in rows.items():
        exits = [f"{row[k]:.1%}" if k in row else "" for k in ("exit_rate", "blocks_skipped_share")]
        spread = f"{row['ratio_min']:.2f}–{row['ratio_max']:.2f}"
        speeds = (f"{row['tokens_per_s']:.0f}", f"{row['against_tokens_per_s']:.0f}")
        table.add_row(name, *speeds, f"{row['ratio']:.2f}", spread, *exits)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
