"""Kinds of pictures that several sections draw."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from exeunt.calibration.evaluation import Measure
from exeunt.calibration.report.drawing import INK, MARKERS, SERIES, whiskers

_APART = 0.32
"""Of a row's height, between estimates that share one."""


@dataclass(frozen=True, slots=True)
class Line:
    """One estimate of a forest plot; `group` picks its colour and marker. Estimates of one name share a row."""

    name: str
    measure: Measure
    group: int = 0


def forest(
    axes: Axes,
    lines: Sequence[Line],
    zero: float | None = 0.0,
    form: str = "{:+.2f}",
    clip: bool = False,
) -> None:
    """Estimates under one another with their intervals, each under its name, its value beside it.

    Names stand inside the picture, so that it needs no margin that a phone has no room for. `zero` is where nothing
    changed. With `clip` an estimate that would leave the others no room is an arrow at the edge, with its value.
    """
    limit = _limit(lines) if clip else math.inf
    rows = list(dict.fromkeys(line.name for line in lines))
    for place, name in enumerate(rows):
        axes.text(0.0, place - 0.36, name, transform=axes.get_yaxis_transform(), va="center", fontsize=9.5)
        own = [line for line in lines if line.name == name]
        for number, line in enumerate(own):
            _estimate(
                axes, line, place + _APART * (number / max(1, len(own) - 1) if number else 0.0), form, limit
            )
    if zero is not None:
        axes.axvline(zero, color=INK, linewidth=1)
    ends = [] if zero is None else [zero]
    low = min([*(line.measure.ends[0] for line in lines if line.measure.value <= limit), *ends])
    high = max([*(min(line.measure.ends[1], limit) for line in lines), *ends])
    room = (high - low) or 1.0
    axes.set_xlim(low - 0.04 * room, high + 0.2 * room)
    axes.set_ylim(len(rows) - 0.5, -0.8)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)


def forest_height(lines: int) -> float:
    """Inches that so many rows want."""
    return 0.85 + 0.46 * lines


def _estimate(axes: Axes, line: Line, place: float, form: str, limit: float) -> None:
    """One estimate at a height, its value to the right; at the edge, to the left, where it lies beyond `limit`."""
    colour, measure = SERIES[line.group % len(SERIES)], line.measure
    beyond = measure.value > limit
    if beyond:
        axes.plot([limit], [place], marker=">", color=colour, linestyle="")
    else:
        axes.errorbar(
            [measure.value],
            [place],
            xerr=whiskers([measure]),
            fmt=MARKERS[line.group % len(MARKERS)],
            color=colour,
            capsize=3,
            linewidth=1.6,
        )
    axes.annotate(
        form.format(measure.value),
        (limit if beyond else measure.ends[1], place),
        xytext=(-8 if beyond else 6, 0),
        textcoords="offset points",
        ha="right" if beyond else "left",
        va="center",
        color=colour,
        fontsize=9.5,
    )


def _limit(lines: Sequence[Line]) -> float:
    """Where the axis ends: beyond it lie estimates of more than five times the middle one's."""
    values = sorted(line.measure.value for line in lines)
    most = 5 * values[(len(values) - 1) // 2]
    inside = [line.measure.ends[1] for line in lines if line.measure.value <= most]
    return 1.1 * max(inside) if inside and most > 0 and values[-1] > most else math.inf
