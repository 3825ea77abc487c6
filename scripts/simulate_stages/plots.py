"""The study's pictures as small SVG files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from scripts.simulate_stages.simulation import POLICIES
from scripts.simulate_stages.sweep import ACCEPTANCES, DEPTHS, Point
from scripts.simulate_stages.tables import best, gathers, only

_COLOURS: Final = ("#888888", "#4c8dd6", "#e08a3c", "#3fa577")
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "exeunt",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
_CONTEXT: Final = 1024


def write_plots(parts: dict[str, list[Point]], folder: Path) -> list[Path]:
    """Draw every picture into `folder`; the files written."""
    approximate = only(parts["approximate"], context=_CONTEXT)
    verified = only(parts["verified"], context=_CONTEXT)
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _write(folder / "simulation-policies.svg", lambda axes, f: _policies(axes, approximate, f)),
        _write(folder / "simulation-depth.svg", lambda axes, f: _depths(axes, approximate, f)),
        _write(folder / "simulation-verified.svg", lambda axes, f: _acceptance(axes, verified, f)),
    ]


def _write(path: Path, draw: Callable[[Axes, str], None]) -> Path:
    """Two panels, one for each format."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.2, 3.2), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(1, 2, sharey=True)
        for axes, formats in zip(panels, ("bf16", "int4"), strict=True):
            draw(axes, formats)
            axes.minorticks_off()
            axes.axhline(1.0, color="black", linewidth=0.8)
            axes.set_title({"bf16": "bf16 weights and KV", "int4": "INT4 weights and KV"}[formats])
        panels[0].set_ylabel("tokens/s, of those with exits off")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=8)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path


def _line(axes: Axes, points: list[Point], colour: str, label: str, style: str = "o-") -> None:
    axes.plot([p.resident for p in points], [p.ratio for p in points], style, color=colour, label=label, ms=4)
    axes.set(xscale="log", xlabel=f"sequences at once (context {_CONTEXT})")


def _policies(axes: Axes, points: list[Point], formats: str) -> None:
    """Policies at one exit rate; a single sequence has no policy."""
    points = only(points, formats=formats, depth=0.5, exit_rate=0.6, mode="propagate")
    for policy, colour in zip(POLICIES, _COLOURS, strict=True):
        line = [p for p in points if p.resident == 1 or p.policy == policy]
        _line(axes, line, colour, policy)


def _depths(axes: Axes, points: list[Point], formats: str) -> None:
    points = only(points, formats=formats, exit_rate=0.6)
    for depth, colour in zip(DEPTHS, _COLOURS[1:], strict=True):
        for mode, style in (("propagate", "o-"), ("backfill", "s--")):
            line = [p for p in only(points, depth=depth, mode=mode) if gathers(p)]
            _line(axes, line, colour, f"after {depth:g}, {mode}", style)


def _acceptance(axes: Axes, points: list[Point], formats: str) -> None:
    """Exit after a quarter, the best draft length at every load."""
    points = [p for p in only(points, formats=formats, depth=0.25) if gathers(p)]
    for acceptance, colour in zip(ACCEPTANCES, _COLOURS, strict=True):
        of_acceptance = only(points, acceptance=acceptance)
        loads = dict.fromkeys(p.resident for p in of_acceptance)
        line = [best(only(of_acceptance, resident=load)) for load in loads]
        _line(axes, line, colour, f"acceptance {acceptance:g}")
