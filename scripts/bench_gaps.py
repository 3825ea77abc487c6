"""Measures the time between an answer's tokens while long prompts keep coming: the last of `make bench`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from exeunt.compression.variant import Variant
from scripts.bench_runs import RESULTS, VARIANTS, Count, EngineRuns, Out, Sizes, packaged_runs, write_result

SHORT = 64  # tokens of the prompts beside long ones
STREAMS = 4

console = Console()


def main(out: Out = None, prompt_tokens: Count = 880, new_tokens: Count = 128, repeats: Count = 5) -> None:
    """Measure, print a table, write JSON."""
    sizes = Sizes(prompt_tokens, new_tokens, repeats, STREAMS)
    with packaged_runs(sizes) as ours:
        results = {
            f"{STREAMS} streams, {label}": _gaps(ours, variant, repeats)
            for label, variant in VARIANTS.items()
        }
        path = out or RESULTS / "packaged-gaps.json"
        write_result(path, ours.model, sizes, results=results)
    _print(results)
    console.print(f"written to {path}")


def _gaps(ours: EngineRuns, variant: Variant, repeats: int) -> dict[str, Any]:
    """Quantiles in seconds, exits off: alone, and while prompts are read in one after the other; in turn."""
    long = ours.prompts(2 * STREAMS)
    short = [prompt[:SHORT] for prompt in long[:STREAMS]]
    ours.gaps(short, variant, long)
    alone, beside = [], []
    for _ in range(repeats):
        alone += ours.gaps(short, variant)
        beside += ours.gaps(short, variant, long)
    found: dict[str, Any] = {
        name: {f"p{share}": float(np.quantile(gaps, share / 100)) for share in (50, 99)}
        for name, gaps in (("alone_s", alone), ("beside_s", beside))
    }
    return found | {"p99_ratio": found["beside_s"]["p99"] / found["alone_s"]["p99"]}


def _print(rows: Mapping[str, Any]) -> None:
    table = Table("gaps between tokens, ms", "p50", "p99", "p50 beside", "p99 beside", "p99 ratio")
    for what, row in rows.items():
        figures = (1e3 * row[name][at] for name in ("alone_s", "beside_s") for at in ("p50", "p99"))
        table.add_row(what, *(f"{figure:.2f}" for figure in figures), f"{row['p99_ratio']:.2f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
