"""A load of the packaged model: where the engine's thread spends a tick, as a table (`scripts.tick_time`)."""

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from exeunt.compression.model import load_bundle
from exeunt.compression.variant import Variant
from exeunt.deploy.bench_engine import engine_driver
from exeunt.deploy.bench_load import Load
from exeunt.deploy.packaged import packaged_bundle
from scripts.tick_time import SETTLING, unwatched, watching

console = Console(width=110)

MODES: dict[str, dict[str, Any]] = {
    "off": {"mode": "off"},
    "verified": {"mode": "verified"},
    "propagate": {"mode": "approximate", "threshold": 0.5, "skipped_kv": "propagate"},
    "backfill": {"mode": "approximate", "threshold": 0.5, "skipped_kv": "backfill"},
}


def main(
    streams: Annotated[int, typer.Option(min=1)] = 1,
    mode: Annotated[str, typer.Option(help=", ".join(MODES))] = "off",
    weights: Annotated[str, typer.Option(help="full or int4, keys and values alike")] = "int4",
    new_tokens: Annotated[int, typer.Option(min=1)] = 192,
    device: str = "cpu",
    bundle: Annotated[Path | None, typer.Option(help="None: the packaged model's")] = None,
    most: Annotated[
        int, typer.Option(min=0, help="functions to show, 0: only what the host takes unwatched")
    ] = 30,
) -> None:
    """Run a load thrice: say what the host took of the second, and of the third which functions took longest."""
    if mode not in MODES or weights not in ("full", "int4"):
        raise typer.BadParameter(
            f"there is no mode {mode} with weights {weights}: modes are {', '.join(MODES)}, weights full or int4"
        )
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = load_bundle(bundle or packaged_bundle(), device=device, dtype=dtype, weights="both")
    load = Load(streams, 16, new_tokens, streams, 0.0)
    asked = {**asdict(Variant(weights, weights)), "early_exit": MODES[mode]}  # type: ignore[arg-type]
    driver = engine_driver(model, load)
    try:
        prompts = driver.prompts(streams, load.prompt_tokens)
        driver.run(prompts, asked, load)
        with unwatched() as ticks:
            driver.run(prompts, asked, load)
        host = statistics.median(ticks[SETTLING:] or ticks)
        console.print(f"unwatched, outside native passes: {host * 1e6:.0f} µs of CPU a tick")
        if not most:
            return
        with watching() as found:
            driver.run(prompts, asked, load)
    finally:
        driver.close()
    medians = found.medians()
    whole = medians.pop("", 0.0)
    shown = Table("function", "µs a tick", title=f"{whole * 1e6:.0f} µs a tick, {len(found.settled)} ticks")
    for name, seconds in list(medians.items())[:most]:
        shown.add_row(name, f"{seconds * 1e6:.1f}")
    console.print(shown)


if __name__ == "__main__":
    typer.run(main)
