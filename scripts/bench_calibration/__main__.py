"""Measures what a calibration costs and writes JSON: `python -m scripts.bench_calibration`, an hour on two cores.

Memory: `exeunt calibrate`'s whole pipeline, full weights streamed, on random Llamas that grow; each in a process of its
own that is watched every five milliseconds. Counted is anonymous memory, which nobody else can have: pages of mapped
files (checkpoint, journal, states of whole splits) are in the resident set too, but the system takes them back when it
needs them. The C library keeps freed pieces of up to 32 MiB for itself, which is nothing beside a large model and most
of what a small one takes; here it gives back whatever has a MiB, as it does with a large model's arrays.

Time: the packaged model from scratch at several numbers of tokens, and the straight line through them.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from exeunt.calibration.memory_plan import block_bytes
from exeunt.compression.architecture import load_architecture
from exeunt.deploy import packaged_model
from exeunt.deploy.bench import machine
from scripts.bench_calibration.arithmetic import SHAPES, int4_bytes, needs
from scripts.bench_calibration.point import Point
from scripts.bench_calibration.random_model import Size, write_model

ROOT: Final = Path(__file__).parents[2]
RESULTS: Final = ROOT / "benchmarks" / "results" / "calibration-cost.json"
GIVING_BACK: Final = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""What makes glibc return pieces of at least a MiB to the system when they are freed."""
MIB: Final = 2**20
GIB: Final = 2**30

console = Console(width=None if sys.stdout.isatty() else 140)


class Part(StrEnum):
    """What is measured."""

    MEMORY = "memory"
    TIME = "time"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. The two largest models differ in their number of blocks alone."""

    sizes: tuple[Size, ...]
    tokens: tuple[int, ...]
    memory_tokens: int
    least_tokens: int
    row_tokens: int
    batch_tokens: int


WHOLE: Final = Plan(
    sizes=(
        Size(hidden=512, inner=1376, blocks=7, heads=8),  # 23M parameters
        Size(hidden=768, inner=2048, blocks=9, heads=12),  # 62M
        Size(hidden=1024, inner=2816, blocks=10, heads=16),  # 121M
        Size(hidden=1024, inner=2816, blocks=21, heads=16),  # 245M
    ),
    tokens=(12_000, 24_000, 48_000),
    memory_tokens=3_000,
    least_tokens=3_000,
    row_tokens=256,
    batch_tokens=1_024,
)
QUICK: Final = Plan(
    sizes=(Size(128, 352, 3, 4), Size(128, 352, 6, 4)),
    tokens=(6_000, 8_000, 10_000),
    memory_tokens=2_000,
    least_tokens=2_000,
    row_tokens=128,
    batch_tokens=512,
)
Out = Annotated[Path | None, typer.Option(help="where the JSON goes")]
Quick = Annotated[
    bool, typer.Option("--quick", help="tiny models and few tokens; written only where --out says")
]


Only = Annotated[
    Part | None,
    typer.Option(help="measure this part anew and keep the other of the JSON that is there; None: both"),
]


def main(out: Out = None, quick: Quick = False, only: Only = None) -> None:
    """Measure, print tables, write JSON."""
    plan = QUICK if quick else WHOLE
    path = out or (None if quick else RESULTS)
    kept = _kept(path, asdict(plan), only)
    record: dict[str, Any] = {
        "machine": machine(),
        "settings": asdict(plan),
        "memory": kept["memory"] if only is Part.TIME else _memory_points(plan),
        "time": kept["time"] if only is Part.MEMORY else _time_points(plan, quick=quick),
        "arithmetic": _arithmetic(),
    }
    record["memory_growth"] = memory_growth(record["memory"])
    record["time_fit"] = line_through(record["time"])
    _print(record)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")
        console.print(f"written to {path}")


def _kept(path: Path | None, settings: Mapping[str, Any], only: Part | None) -> dict[str, Any]:
    """The JSON that is there, for the part that is not measured; raises BadParameter where it does not fit."""
    if only is None:
        return {}
    if path is None or not path.is_file():
        raise typer.BadParameter(f"there is no JSON at {path} whose other part could be kept")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != json.loads(json.dumps(settings)):
        raise typer.BadParameter(f"{path} was measured with other settings, measure both parts")
    return found


def run_point(point: Point, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a process of its own says of `point`; raises RuntimeError with its last words where it fails."""
    command = [sys.executable, "-m", "scripts.bench_calibration.point", json.dumps(asdict(point))]
    added = {**os.environ, **(environment or {})}
    done = subprocess.run(command, cwd=ROOT, env=added, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{point.model} could not be calibrated: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _memory_points(plan: Plan) -> list[dict[str, Any]]:
    rows = []
    for size in plan.sizes:
        with tempfile.TemporaryDirectory(prefix="exeunt-bench-") as folder:
            path = write_model(size, Path(folder) / "model")
            spec = load_architecture(path)
            console.print(f"calibrating {spec.parameters / 1e6:.0f}M random parameters", style="dim")
            point = Point(
                model=str(path),
                data=_text(),
                tokens=plan.memory_tokens,
                least_tokens=plan.least_tokens,
                row_tokens=plan.row_tokens,
                batch_tokens=plan.batch_tokens,
                stream_weights=True,
                journal=True,
                brief=True,
            )
            found = run_point(point, GIVING_BACK)
        dtype = torch.float32
        rows.append(
            {
                "parameters": spec.parameters,
                "size": asdict(size),
                "full_bytes": spec.parameters * dtype.itemsize,
                "int4_bytes": int4_bytes(spec),
                "embedding_bytes": 2 * spec.vocab_size * spec.hidden_size * dtype.itemsize,
                "block_bytes": block_bytes(spec, dtype),
                **found,
            }
        )
    return rows


def _time_points(plan: Plan, *, quick: bool) -> list[dict[str, Any]]:
    rows = []
    for tokens in plan.tokens:
        console.print(f"calibrating the packaged model on {tokens:,} tokens", style="dim")
        point = Point(
            model=str(packaged_model.path()),
            data=_text(),
            tokens=tokens,
            least_tokens=min(plan.tokens),
            row_tokens=512,
            batch_tokens=4096,
            stream_weights=None,
            journal=False,
            brief=quick,
        )
        rows.append({"tokens": tokens, **run_point(point)})
    return rows


def _text() -> str:
    return str(packaged_model.path() / packaged_model.CALIBRATION_TEXT)


def memory_growth(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How the peak grows from the second largest model to the largest, which has more blocks and is the same otherwise.

    `per_full_byte` is per byte of its weights in full precision, `per_int4_byte` per byte of its INT4 weights.
    """
    less, more = rows[-2:]
    grown = anonymous(more) - anonymous(less)
    return {
        "per_full_byte": grown / (more["full_bytes"] - less["full_bytes"]),
        "per_int4_byte": grown / (more["int4_bytes"] - less["int4_bytes"]),
    }


def anonymous(row: Mapping[str, Any]) -> int:
    """Bytes of anonymous memory at the worst moment beyond those before the first step, which has no model yet."""
    return int(row["peak"]["anonymous"] - row["before"]["anonymous"])


def line_through(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The least-squares line of seconds by tokens: seconds at none, per thousand tokens, and the worst deviation."""
    tokens = np.array([row["tokens"] for row in rows], dtype=np.float64)
    seconds = np.array([row["seconds"] for row in rows])
    slope, start = np.polyfit(tokens, seconds, 1)
    off = np.abs(start + slope * tokens - seconds) / seconds
    return {
        "seconds_at_none": float(start),
        "seconds_per_1000_tokens": float(1000 * slope),
        "worst_deviation": float(off.max()),
    }


def _arithmetic() -> dict[str, Any]:
    found = {}
    for name, spec in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            need = needs(spec, dtype)
            found[f"{name}, {str(dtype).removeprefix('torch.')}"] = {**asdict(need), "peak": need.peak}
    return found


def _print(record: Mapping[str, Any]) -> None:
    headers = (
        "parameters",
        "full",
        "INT4",
        "embeddings",
        "one block",
        "peak",
        "in phase",
        "resident",
        "seconds",
    )
    table = Table(*headers, title="memory in MiB; full weights streamed")
    for row in record["memory"]:
        sizes = [row[f"{kind}_bytes"] for kind in ("full", "int4", "embedding", "block")]
        worst = max(row["phases"], key=lambda phase: phase["peak"]["anonymous"])
        shown = [f"{size / MIB:.1f}" for size in (*sizes, anonymous(row))]
        resident = f"{row['peak']['resident'] / MIB:.0f}"
        table.add_row(
            f"{row['parameters'] / 1e6:.0f}M", *shown, worst["phase"], resident, f"{row['seconds']:.0f}"
        )
    console.print(table)
    growth = record["memory_growth"]
    console.print(
        f"more blocks: {growth['per_full_byte']:.2f} bytes of peak for each of theirs in full precision, "
        f"{growth['per_int4_byte']:.2f} for each in INT4"
    )
    table = Table("tokens", "seconds", "peak MiB", title="the packaged model")
    for row in record["time"]:
        table.add_row(f"{row['tokens']:,}", f"{row['seconds']:.1f}", f"{anonymous(row) / MIB:.0f}")
    console.print(table)
    fit = record["time_fit"]
    console.print(
        f"{fit['seconds_at_none']:.1f} s and {fit['seconds_per_1000_tokens']:.2f} s per 1,000 tokens; worst deviation "
        f"from the line {fit['worst_deviation']:.0%}"
    )
    for name, need in record["arithmetic"].items():
        console.print(f"\n[bold]{name}[/bold]: {need['peak'] / GIB:.1f} GiB at the worst moment")
        console.print("  held: " + _parts(need["held"]))
        for phase, parts in need["phases"].items():
            console.print(f"  {phase}: {_parts(parts)}")


def _parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())


if __name__ == "__main__":
    typer.run(main)
