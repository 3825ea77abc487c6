"""Pictures of what `make gpu-check` measured, for docs/performance.md: `python -m scripts.gpu_figures`.

They show what its tables say, out of the same JSON: how long a decode step takes beside reading what it must read, and
what the linear layers take beside PyTorch's products, by rows.
"""

import json
from typing import Any, Final

import typer
from matplotlib.axes import Axes

from exeunt.calibration.report.drawing import INK, draw, series
from exeunt.calibration.report.parts import Figure
from scripts.gpu_tables import linear_times, memory_rate, steps_of
from scripts.report_figures import standalone
from scripts.result_tables import RESULTS, ROOT

RECORD: Final = RESULTS / "gpu-check-nvidia-h200.json"
IMAGES: Final = ROOT / "docs" / "images"
_MODEL: Final = "mistral-7b"
_VARIANTS: Final = (("full", "full"), ("int4", "int4"))
_LAYER: Final = "mistral-7b gate_up"
_MICROSECONDS: Final = (25, 50, 100, 200, 400)


def step_figure(record: dict[str, Any]) -> Figure:
    """Milliseconds of decode steps, by sequences and context, each beside its floor."""
    steps, rate = steps_of(record, _MODEL), memory_rate(record)
    sizes = sorted({(step["context"], step["sequences"]) for step in steps})

    def paint(axes: Axes) -> None:
        for number, (weights, kv) in enumerate(_VARIANTS):
            own = {
                (step["context"], step["sequences"]): step
                for step in steps
                if (step["weights"], step["kv"]) == (weights, kv)
            }
            at = [place for place, size in enumerate(sizes) if size in own]
            found = [own[sizes[place]] for place in at]
            look, offset = series(number), 0.18 * (2 * number - 1)
            where = [place + offset for place in at]
            floors = [1e3 * step["bytes"] / rate for step in found]
            axes.vlines(where, floors, [step["ms"] for step in found], color=look.colour, linewidth=1.2)
            axes.plot(
                where, [step["ms"] for step in found], look.marker, color=look.colour, label=f"{weights}/{kv}"
            )
            axes.plot(where, floors, "_", color=look.colour, markersize=11)
        axes.plot([], [], "_", color=INK, markersize=11, label="reading alone")
        axes.set_xticks(range(len(sizes)), [f"{rows} ×\n{context}" for context, rows in sizes])
        axes.set_xlabel("sequences × context")
        axes.set_ylabel("ms a step")
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left")

    return draw(
        "gpu-steps",
        "Milliseconds of a decode step and of reading what it must read",
        "A decode step of the Mistral-7B shape, beside the time of reading its weights, keys and values once.",
        paint,
        width=6.6,
    )


def linear_figure(record: dict[str, Any]) -> Figure:
    """Microseconds of the largest linear layer by rows, of INT4, full weights and PyTorch."""
    times = linear_times(record, _LAYER)

    def paint(axes: Axes) -> None:
        names = ("INT4", "full weights", "PyTorch")
        for number, name in enumerate(names):
            look = series(number)
            axes.plot(list(times), [each[number] for each in times.values()], label=name, **look.look)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_yticks(_MICROSECONDS, [str(each) for each in _MICROSECONDS])
        axes.minorticks_off()
        axes.set_xticks(list(times), [str(rows) for rows in times])
        axes.set_xlabel("rows")
        axes.set_ylabel("µs")
        axes.legend(loc="upper left")

    return draw(
        "gpu-linears",
        "Microseconds of a linear layer by rows: INT4, full weights and PyTorch's product",
        "Gate and up of the Mistral-7B shape, 28,672 outputs of 4,096 inputs, by rows.",
        paint,
        width=6.6,
    )


def figures(record: dict[str, Any]) -> tuple[Figure, ...]:
    """All pictures of a record."""
    return step_figure(record), linear_figure(record)


def main() -> None:
    """Write both pictures into docs/images."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    for figure in figures(record):
        path = IMAGES / f"{figure.name}.svg"
        path.write_text(standalone(figure.svg), encoding="utf-8")
        typer.echo(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
