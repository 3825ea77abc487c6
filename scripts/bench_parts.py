"""Measures the parts of a decode step of the packaged model, with exits and without: what `make bench` calls second.

What exits can save is the time of the blocks they skip and of the model's own head; what they cost is their gate with
its projection, the keys and values of skipped blocks, and rows that are taken out and closed up. The parts are timed by
themselves on a batch of the load's size, in turn, each as a call of its own with the Python of that, and set beside
whole steps of the engine from the same run; what the parts do not explain (prompts, the scheduler, Python) is named as
the rest.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.compression.exits import ExitHead
from exeunt.compression.kv_format import KVPages, page_bytes_for
from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.kernels.paged_batch import PagedBatch
from exeunt.server.request import SamplingParams
from exeunt.server.row_sampling import RowSampling
from exeunt.server.sampling import sample
from scripts.bench_runs import (
    OFF,
    RESULTS,
    VARIANTS,
    Count,
    EngineRuns,
    Out,
    Prompts,
    Run,
    Sizes,
    packaged_runs,
    write_result,
)

ROUNDS, CALLS = 15, 20  # every part is called so often in a row, so many times in turn with the others

console = Console()


def main(
    out: Out = None,
    prompt_tokens: Count = 128,
    new_tokens: Annotated[int, typer.Option(min=2)] = 256,
    repeats: Count = 5,
    streams: Count = 8,
) -> None:
    """Measure, print tables, write JSON."""
    sizes = Sizes(prompt_tokens, new_tokens, repeats, streams)
    results: dict[str, Any] = {}
    with packaged_runs(sizes) as runs:
        for count in (1, streams):
            for label, variant in VARIANTS.items():
                steps = _Steps(runs, runs.prompts(count), new_tokens, variant).measure(repeats)
                work = _Batch(runs.model, variant, count, prompt_tokens + new_tokens // 2, steps.left)
                name = f"{count} stream{'s' if count > 1 else ''}, {label}"
                results[name] = _account(steps, work.measure())
                _print(name, results[name])
    path = out or RESULTS / "packaged-parts.json"
    calls = {"rounds": ROUNDS, "calls": CALLS}
    write_result(path, runs.model, sizes, timed=calls, unit="microseconds per step", results=results)
    console.print(f"written to {path}")


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Whole decode steps of the engine (seconds), and what exits did in them."""

    off: float
    on: float
    target: float
    exit_rate: float
    rows: int
    left: int  # of the rows of a batch, those that leave in a typical step


class _Steps:
    """Times the engine's steps, its prefill included, with exits on and off in turn."""

    def __init__(self, runs: EngineRuns, prompts: Prompts, new_tokens: int, variant: Variant) -> None:
        self._runs, self._prompts, self._new_tokens, self._variant = runs, prompts, new_tokens, variant
        self._target = max(runs.certified(variant), default=0.0)

    def measure(self, repeats: int) -> StepTimes:
        """Medians over the repeats."""
        exits = (
            {"mode": "approximate", "max_disagreement": self._target, "skipped_kv": "propagate"}
            if self._target
            else OFF
        )
        self._run(OFF)
        pairs = [(self._run(OFF), self._run(exits)) for _ in range(repeats)]
        rate = statistics.median(on.exit_rate for _, on in pairs)
        return StepTimes(
            off=statistics.median(off.seconds for off, _ in pairs) / self._new_tokens,
            on=statistics.median(on.seconds for _, on in pairs) / self._new_tokens,
            target=self._target,
            exit_rate=rate,
            rows=len(self._prompts),
            left=round(rate * len(self._prompts)),
        )

    def _run(self, early_exit: Mapping[str, Any]) -> Run:
        return self._runs.at_once(self._prompts, self._variant, early_exit)


class _Batch:
    """One decode batch at a given context, outside of the engine, and the parts that a step is made of."""

    def __init__(self, model: LoadedModel, variant: Variant, rows: int, context: int, left: int) -> None:
        self._model, self._decoder, self._rows = model, model.decoder(variant), rows
        page_bytes = page_bytes_for(model.spec, model.dtype)
        layout = model.kv_layout(variant, page_bytes)
        each = -(-context // layout.page_tokens)
        self._pages = KVPages(layout, torch.zeros(rows * each * page_bytes, dtype=torch.uint8))
        self._geometry = self._geometry_of(rows, context, each, layout.page_tokens)
        self._staying = max(1, rows - left)
        self._few = self._geometry_of(self._staying, context, each, layout.page_tokens)
        self._gone = self._geometry_of(max(1, left), context, each, layout.page_tokens)
        self._ids = torch.arange(rows) + 7

    @staticmethod
    def _geometry_of(rows: int, context: int, each: int, page_tokens: int) -> PagedBatch:
        tables = torch.arange(rows * each, dtype=torch.int32).reshape(rows, each)
        place = context - 1
        return PagedBatch(
            positions=torch.full((rows,), place),
            slots=tables[:, place // page_tokens].long() * page_tokens + place % page_tokens,
            query_starts=torch.arange(rows + 1, dtype=torch.int32),
            page_tables=tables,
            max_context=context,
        )

    @torch.inference_mode()
    def measure(self) -> dict[str, float]:
        """Microseconds of each part."""
        decoder, blocks = self._decoder, self._model.spec.blocks
        hidden = decoder.embed(self._ids, self._geometry.positions)
        run = decoder.run_blocks
        parts: dict[str, Callable[[], object]] = {
            "all blocks": lambda: run(hidden, self._geometry, self._pages, 0, blocks),
            "own head": lambda: decoder.head(hidden),
            "draw": self._draw(decoder.head(hidden)),
        }
        for head in [self._model.exits[place] for place in self._model.certified_exits][-1:]:
            parts |= self._exit_parts(decoder, head, hidden, blocks)
        return _in_turn(parts)

    def _exit_parts(
        self, decoder: Decoder, head: ExitHead, hidden: Tensor, blocks: int
    ) -> dict[str, Callable[[], object]]:
        run, depth, few = decoder.run_blocks, head.depth, hidden[: self._staying]
        gone = hidden[: self._gone.tokens].contiguous()
        state = head.read(hidden)[0]
        return {
            "blocks up to the exit": lambda: run(hidden, self._geometry, self._pages, 0, depth),
            "blocks behind the exit, all rows": lambda: run(
                hidden, self._geometry, self._pages, depth, blocks
            ),
            "blocks behind the exit, rows that stay": lambda: run(few, self._few, self._pages, depth, blocks),
            "gate with its projection": lambda: head.gate(
                hidden, torch.full((self._rows,), 0.5), decoder.project_exit
            ),
            "of it: the projection": lambda: decoder.project_exit(state),
            "keys and values of rows that leave": lambda: decoder.project_kv(
                gone, self._gone, self._pages, depth, blocks
            ),
            "own head, rows that stay": lambda: decoder.head(few),
        }

    def _draw(self, logits: Tensor) -> Callable[[], object]:
        rows = [RowSampling(SamplingParams(), 0, 0)] * len(logits)
        return lambda: sample(logits, rows)


def _in_turn(parts: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds of each part: the median over rounds of the mean of a run of calls."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(ROUNDS):
        for name, part in parts.items():
            part()
            began = time.perf_counter()
            for _ in range(CALLS):
                part()
            times[name].append((time.perf_counter() - began) / CALLS * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def _account(steps: StepTimes, parts: Mapping[str, float]) -> dict[str, Any]:
    """The engine's steps beside the sums of their parts."""
    off = parts["all blocks"] + parts["own head"] + parts["draw"]
    record: dict[str, Any] = {
        "exits_off": {"step": steps.off * 1e6, "parts": off, "rest": steps.off * 1e6 - off},
        "parts": dict(parts),
    }
    if steps.target:
        # A single row stays or leaves as a whole: then the parts count as often as it leaves.
        blocks, head = parts["blocks behind the exit, all rows"], parts["own head"]
        if steps.rows == 1:
            saved, head_saved, leave = steps.exit_rate * blocks, steps.exit_rate * head, steps.exit_rate
        else:
            saved = blocks - parts["blocks behind the exit, rows that stay"]
            head_saved, leave = head - parts["own head, rows that stay"], 1.0
        paid = parts["gate with its projection"] + leave * parts["keys and values of rows that leave"]
        on = off - saved - head_saved + paid
        record["exits_on"] = {"step": steps.on * 1e6, "parts": on, "rest": steps.on * 1e6 - on}
        record["exits"] = {
            "target": steps.target,
            "exit_rate": steps.exit_rate,
            "saved_in_blocks": saved,
            "saved_in_own_head": head_saved,
            "paid_in_gate_and_keys": paid,
            "paid_around": record["exits_on"]["rest"] - record["exits_off"]["rest"],
            "ratio_of_steps": steps.off / steps.on,
        }
    return record


def _print(name: str, record: Mapping[str, Any]) -> None:
    table = Table(f"{name}: part of a step", "µs")
    for part, value in record["parts"].items():
        table.add_row(part, f"{value:.0f}")
    for mode in ("exits_off", "exits_on"):
        for what, value in record.get(mode, {}).items():
            table.add_row(f"{mode.replace('_', ' ')}: {what}", f"{value:.0f}")
    for what, value in record.get("exits", {}).items():
        table.add_row(what.replace("_", " "), f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
