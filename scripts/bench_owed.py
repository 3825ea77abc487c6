"""Measures how many positions may wait for deeper blocks before a pass goes deep for them: `EngineConfig.max_owed`.

Approximate exits with backfill at the loosest certified target, eight streams; each bound in an engine of its own,
in turn with the default's. Not part of `make bench`: it chooses a constant.
"""

from functools import partial
from typing import Any

import typer
from rich.console import Console

from exeunt.server.engine_config import MAX_OWED
from scripts.bench_runs import RESULTS, VARIANTS, Count, Out, Sizes, in_turn, packaged_runs, write_result

BOUNDS = (1, 2, 4, 16)
STREAMS = 8

console = Console()


def main(out: Out = None, prompt_tokens: Count = 128, new_tokens: Count = 256, repeats: Count = 5) -> None:
    """Measure, print, write JSON."""
    sizes = Sizes(prompt_tokens, new_tokens, repeats, STREAMS)
    results: dict[str, Any] = {}
    with packaged_runs(sizes) as default:
        prompts = default.prompts(STREAMS)
        for bound in BOUNDS:
            with packaged_runs(sizes, max_owed=bound) as other:
                for label, variant in VARIANTS.items():
                    if not (certified := default.certified(variant, "backfill")):
                        continue
                    asked = {
                        "mode": "approximate",
                        "max_disagreement": max(certified),
                        "skipped_kv": "backfill",
                    }
                    row, _ = in_turn(
                        partial(other.at_once, prompts, variant, asked),
                        partial(default.at_once, prompts, variant, asked),
                        repeats,
                    )
                    name = f"{label}, {bound} against {MAX_OWED}"
                    results[name] = row
                    shown = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
                    console.print(f"{name}: {shown}")
        write_result(out or RESULTS / "packaged-owed.json", default.model, sizes, results=results)


if __name__ == "__main__":
    typer.run(main)
