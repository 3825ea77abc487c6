"""Kinds of pictures that several sections draw."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from exeunt.calibration.evaluation import Measure
from exeunt.calibration.report.drawing import INK, SERIES, whiskers


@dataclass(frozen=True, slots=True)
class Line:
    """One estimate of a forest plot; `group` picks its colour and marker."""

    name: str
    measure: Measure
    group: int = 0


def forest(axes: Axes, lines: Sequence[Line], zero: float | None = 0.0, form: str = "{:+.2f}") -> None:
    """Estimates under one another with their intervals, each under its name, its value beside it.

    Names stand inside the picture, so that it needs no margin that a phone has no room for. `zero` is where nothing
    changed.
    """
    for place, line in enumerate(lines):
        colour, measure = SERIES[line.group % len(SERIES)], line.measure
        axes.errorbar(
            [measure.value],
            [place],
            xerr=whiskers([measure]),
            fmt=("o", "s", "^", "D")[line.group % 4],
            color=colour,
            capsize=3,
            linewidth=1.6,
        )
        axes.text(
            0.0, place - 0.36, line.name, transform=axes.get_yaxis_transform(), va="center", fontsize=9.5
        )
        axes.annotate(
            form.format(measure.value),
            (measure.high, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9.5,
        )
    if zero is not None:
        axes.axvline(zero, color=INK, linewidth=1)
    low = min([*(line.measure.low for line in lines), *([] if zero is None else [zero])])
    high = max([*(line.measure.high for line in lines), *([] if zero is None else [zero])])
    room = (high - low) or 1.0
    axes.set_xlim(low - 0.04 * room, high + 0.2 * room)
    axes.set_ylim(len(lines) - 0.5, -0.8)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)


def forest_height(lines: int) -> float:
    """Inches that so many estimates want."""
    return 0.85 + 0.46 * lines
