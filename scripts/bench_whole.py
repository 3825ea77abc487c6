"""Measures ticks in one native call against the same ticks a stage at a time: what `make bench` calls fourth.

Two engines on one bundle, in turn: exits off, at the loosest certified target with propagated and with backfilled keys
and values, and verified. The answers are the same.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, get_args

import typer
from rich.console import Console

from exeunt.compression.variant import SkippedKV, Variant
from scripts.bench_runs import (
    OFF,
    RESULTS,
    VARIANTS,
    Count,
    EngineRuns,
    Out,
    Sizes,
    in_turn,
    packaged_runs,
    write_result,
)
from scripts.wait_for_all import by_stages

STREAMS = (1, 8, 32)
VERIFIED = {"mode": "verified"}

console = Console()


def main(out: Out = None, prompt_tokens: Count = 128, new_tokens: Count = 256, repeats: Count = 5) -> None:
    """Measure, print, write JSON."""
    sizes = Sizes(prompt_tokens, new_tokens, repeats, 8)
    results: dict[str, Any] = {}
    with packaged_runs(sizes) as whole, packaged_runs(sizes, changed=by_stages) as staged:
        for streams in STREAMS:
            prompts = whole.prompts(streams)
            for label, variant in VARIANTS.items():
                for mode, asked in _modes(whole, variant):
                    row, pairs = in_turn(
                        partial(whole.at_once, prompts, variant, asked),
                        partial(staged.at_once, prompts, variant, asked),
                        repeats,
                    )
                    name = f"{streams} stream{'s' if streams > 1 else ''}, {label}, {mode}"
                    # of verified tokens it would say how many were drafted, by the exit or by a look-up
                    rate = None if asked == VERIFIED else pairs[0][0].exit_rate
                    results[name] = row | {"exit_rate": rate}
                    shown = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
                    console.print(f"{name}: {shown}")
        path = out or RESULTS / "packaged-whole.json"
        write_result(path, whole.model, sizes, results=results)
    console.print(f"written to {path}")


def _modes(runs: EngineRuns, variant: Variant) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "exits off", OFF
    for skipped_kv in get_args(SkippedKV):
        if certified := runs.certified(variant, skipped_kv):
            target = max(certified)
            asked = {"mode": "approximate", "max_disagreement": target, "skipped_kv": skipped_kv}
            yield f"{skipped_kv} at {target:g}", asked
    yield "verified", VERIFIED


if __name__ == "__main__":
    typer.run(main)
