"""Pictures of what `make gpu-check` measured, for docs/performance.md: `python -m scripts.result_tables` writes them.

Each GPU has its own, by its name. They show what its tables say, out of the same JSON: how long a decode step takes
beside reading what it must read, and what the linear layers take beside PyTorch's products, by rows.
"""

from pathlib import Path
from typing import Final

from matplotlib.axes import Axes

from exeunt.calibration.report.drawing import INK, draw, series
from exeunt.calibration.report.parts import Figure
from scripts.gpu_page import picture, pictures
from scripts.gpu_records import (
    LARGE,
    LARGE_LAYER,
    ROOT,
    Row,
    gpu_records,
    linear_times,
    memory_rate,
    steps_of,
)
from scripts.report_figures import standalone

IMAGES: Final = ROOT / "docs" / "images"
_VARIANTS: Final = (("full", "full"), ("int4", "int4"))
_MICROSECONDS: Final = (25, 50, 100, 200, 400)


def step_figure(name: str, record: Row) -> Figure:
    """Milliseconds of decode steps, by sequences and context, each beside its floor where the rate is known."""
    steps, rate = steps_of(record, LARGE), memory_rate(record)
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
            axes.plot(
                where, [step["ms"] for step in found], look.marker, color=look.colour, label=f"{weights}/{kv}"
            )
            if rate is not None:
                floors = [1e3 * step["bytes"] / rate for step in found]
                axes.vlines(where, floors, [step["ms"] for step in found], color=look.colour, linewidth=1.2)
                axes.plot(where, floors, "_", color=look.colour, markersize=11)
        axes.plot([], [], "_", color=INK, markersize=11, label="reading alone")
        axes.set_xticks(range(len(sizes)), [f"{rows} ×\n{context}" for context, rows in sizes])
        axes.set_xlabel("sequences × context")
        axes.set_ylabel("ms a step")
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left")

    return draw(
        name,
        "Milliseconds of a decode step and of reading what it must read",
        "A decode step of the Mistral-7B shape, beside the time of reading its weights, keys and values once.",
        paint,
        width=6.6,
    )


def linear_figure(name: str, record: Row) -> Figure:
    """Microseconds of the largest linear layer by rows, of INT4, full weights and PyTorch."""
    times = linear_times(record, LARGE_LAYER)

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
        name,
        "Microseconds of a linear layer by rows: INT4, full weights and PyTorch's product",
        "Gate and up of the Mistral-7B shape, 28,672 outputs of 4,096 inputs, by rows.",
        paint,
        width=6.6,
    )


_DRAWN: Final = {"decode": step_figure, "linears": linear_figure}


def figures(name: str, record: Row) -> tuple[Figure, ...]:
    """All pictures that a record has the figures for; `name` is that of its file."""
    return tuple(_DRAWN[what](picture(name, what), record) for what in pictures(record))


def write_figures(folder: Path = IMAGES) -> list[Path]:
    """Write the pictures of all records into a folder; the files written."""
    written = []
    for name, record in gpu_records().items():
        for figure in figures(name, record):
            written.append(folder / f"{figure.name}.svg")
            written[-1].write_text(standalone(figure.svg), encoding="utf-8")
    return written
