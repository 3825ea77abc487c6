"""Simulates stage scheduling on an H200 with Mistral-7B: `python -m scripts.simulate_stages`, minutes on one core."""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer
from rich.progress import track

from scripts.simulate_stages.cost import BF16, H200, INT4, MISTRAL_7B
from scripts.simulate_stages.decision import decision_costs
from scripts.simulate_stages.plots import write_plots
from scripts.simulate_stages.server_tick import tick_costs
from scripts.simulate_stages.simulation import SCREENED
from scripts.simulate_stages.sweep import Point, as_columns, measured, sweeps
from scripts.simulate_stages.tables import tables

ROOT: Final = Path(__file__).parents[2]
DecisionsOnly = Annotated[bool, typer.Option("--decisions", help="Only time decisions; write nothing.")]


def main(
    out: Path = ROOT / "benchmarks" / "results" / "simulation.json",
    images: Path = ROOT / "docs" / "images",
    decisions: DecisionsOnly = False,
) -> None:
    """Simulate, write JSON and plots, print tables in Markdown."""
    costs = {
        "fullest": decision_costs("fullest"),
        "least waste": decision_costs("least waste"),
        "the server's next tick": tick_costs(),
    }
    if decisions:
        typer.echo(json.dumps(costs, indent=2))
        return
    parts = {part: _measured(part, points) for part, points in sweeps().items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(as_json(parts, costs))
    write_plots(parts, images)
    for title, table in tables(parts, costs).items():
        typer.echo(f"\n{title}\n\n{table}")
    typer.echo(f"\nwritten to {out} and {images}")


def as_json(parts: dict[str, list[Point]], decisions: dict[str, Any]) -> str:
    """The study as JSON, one line for each point."""
    about = {
        "simulated": True,
        "assumed": {
            "machine": asdict(H200),
            "model": asdict(MISTRAL_7B),
            "formats": [asdict(BF16), asdict(INT4)],
            "screened_in_vain": SCREENED,
        },
        "decision_cost": {
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "python": platform.python_version(),
            },
            "numpy": np.__version__,
            "by_rule_and_rows": decisions,
        },
    }
    written = []
    for part, points in parts.items():
        table = as_columns(points)
        rows = ",\n   ".join(json.dumps(row, separators=(",", ":")) for row in table.pop("rows"))
        written.append(f'  "{part}": {json.dumps(table)[:-1]}, "rows": [\n   {rows}]}}')
    return json.dumps(about, indent=1)[:-2] + ',\n "parts": {\n' + ",\n".join(written) + "\n }\n}\n"


def _measured(part: str, points: list[Point]) -> list[Point]:
    return [measured(point) for point in track(points, description=part, transient=True)]


if __name__ == "__main__":
    typer.run(main)
