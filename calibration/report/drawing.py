"""The report's pictures: matplotlib drawn to inline SVG that takes its colours from the page, light or dark.

Matplotlib because it needs no script in the page, keeps text as text, and gives the same bytes for the same figures.
Figures are drawn as narrow as a phone, so that nothing shrinks there: on a wide page they only grow.

Colours are stand-ins while a picture is drawn and become CSS variables in the SVG. The series are those of Okabe and
Ito (Color Universal Design, 2008), lightened or darkened for contrast of at least 3 : 1 on each page; series also
differ by marker or line, so that no reading rests on colour alone.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas

from exeunt.calibration.evaluation import Measure
from exeunt.calibration.report.parts import Figure

INK: Final = "#123456"
SOFT: Final = "#123457"
GOOD: Final = "#123458"
BAD: Final = "#123459"
SERIES: Final = ("#12345a", "#12345b", "#12345c", "#12345d", "#12345e", "#12345f")
MARKERS: Final = ("o", "s", "^", "D", "v", "P")
LINES: Final[tuple[Any, ...]] = (
    "-",
    (0, (5, 1.5)),
    (0, (1.5, 1.5)),
    (0, (6, 1.5, 1.5, 1.5)),
    (0, (3, 3)),
    "-",
)

VARIABLES: Final = {INK: "ink", SOFT: "soft", GOOD: "good", BAD: "bad"} | {
    colour: f"series-{number}" for number, colour in enumerate(SERIES, 1)
}
"""The CSS variable that each stand-in becomes."""
LIGHT: Final = {
    "ink": "#1d2430",
    "soft": "#5d6675",
    "paper": "#fdfdfc",
    "good": "#1f7a4d",
    "bad": "#b3372f",
    "series-1": "#0072b2",
    "series-2": "#a04000",
    "series-3": "#007a58",
    "series-4": "#b970a5",
    "series-5": "#928018",
    "series-6": "#434a55",
}
DARK: Final = {
    "ink": "#e4e7ec",
    "soft": "#9aa3b1",
    "paper": "#15181d",
    "good": "#5ec48f",
    "bad": "#f08a80",
    "series-1": "#56b4e9",
    "series-2": "#f2702a",
    "series-3": "#2fc497",
    "series-4": "#e9b8d6",
    "series-5": "#f0dc3a",
    "series-6": "#7f8a99",
}

WIDTH: Final = 4.4
"""Inches, of 72 units of the SVG each: about what a phone shows."""
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": SOFT,
    "grid.alpha": 0.22,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 2.2,
}
_FONT: Final = re.compile(r"font: ([^;\"']*?)([\d.]+px) [^;\"]*")
_DIGITS: Final = re.compile(r"(\d\.\d\d)\d+")  # of coordinates: hundredths of a unit are too small to see
_ID: Final = re.compile(r' id="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Series:
    """How one line of a picture looks."""

    colour: str
    marker: str
    line: Any

    @property
    def look(self) -> Mapping[str, Any]:
        """As keywords of `Axes.plot`."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.line}


def series(number: int) -> Series:
    """The look of the `number`-th line; they repeat after six, in another line style."""
    return Series(
        SERIES[number % len(SERIES)],
        MARKERS[number % len(MARKERS)],
        LINES[(number + number // len(SERIES)) % len(LINES)],
    )


def draw(
    name: str,
    label: str,
    caption: str,
    paint: Callable[[Axes], None],
    *,
    height: float = 3.1,
    width: float = WIDTH,
) -> Figure:
    """The picture that `paint` makes on one pair of axes; `label` says to a screen reader what it is."""

    def alone(canvas: Canvas) -> None:
        paint(canvas.add_subplot())

    return draw_panels(name, label, caption, alone, height=height, width=width)


def draw_panels(
    name: str,
    label: str,
    caption: str,
    paint: Callable[[Canvas], None],
    *,
    height: float = 3.1,
    width: float = WIDTH,
) -> Figure:
    """As `draw`, for a picture of several axes, which `paint` adds."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": f"exeunt-{name}"}):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        writer = FigureCanvasSVG(canvas)
        paint(canvas)
        buffer = io.StringIO()
        nothing = {"Date": None, "Creator": None}
        with warnings.catch_warnings():
            # where names leave the axes no room, as those of hardly any text may, the picture is laid out without them
            warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)
            writer.print_svg(buffer, metadata=nothing)  # type: ignore[no-untyped-call]  # savefig draws all twice
    return Figure(name, _inline(buffer.getvalue(), name, label), caption)


def _inline(svg: str, name: str, label: str) -> str:
    """The <svg> element alone, in the page's colours and fonts, its ids unique in the page."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL).replace("xlink:href", "href")
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL).replace(
        ' xmlns:xlink="http://www.w3.org/1999/xlink"', ""
    )
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r"<[^>]+>", lambda tag: _DIGITS.sub(r"\1", tag[0]), svg)
    svg = _FONT.sub(r"font: \1\2 var(--sans)", svg)
    used = set(re.findall(r"(?:href=\"#|url\(#)([^\")]*)", svg))
    svg = _ID.sub(lambda found: f' id="figure-{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>figure-{name}-", svg)
    svg = "\n".join(line.rstrip() for line in svg.splitlines() if line.strip())
    return svg.replace(
        "<svg ", f'<svg id="figure-{name}" role="img" aria-label="{escape(label, quote=True)}" ', 1
    )


def spread(
    axes: Axes,
    values: Sequence[float],
    values_at: Callable[[float], float] = lambda y: y,
    least: float = 0.065,
) -> list[float]:
    """Places for labels at `values` of the y axis, moved apart to at least `least` of the axis' length.

    `values_at` maps an axis value to what is linear along the axis (a logarithm, where it is one). Call it when the
    limits are set.
    """
    low, high = (values_at(limit) for limit in axes.get_ylim())
    order = sorted(range(len(values)), key=lambda index: values[index])
    places = [(values_at(values[index]) - low) / (high - low) for index in order]
    for _ in range(200):
        moved = False
        for left, right in zip(range(len(places) - 1), range(1, len(places)), strict=True):
            short = least - (places[right] - places[left])
            if short > 1e-6:
                places[left] -= short / 2
                places[right] += short / 2
                moved = True
        if not moved:
            break
    found = [0.0] * len(values)
    for place, index in zip(places, order, strict=True):
        found[index] = place
    return found


def label_ends(
    axes: Axes,
    ends: Sequence[tuple[float, str, str]],
    values_at: Callable[[float], float] = lambda y: y,
    least: float = 0.065,
) -> None:
    """Labels to the right of the axes for lines that end at (y, text, colour), none over another."""
    for place, (_, text, colour) in zip(
        spread(axes, [end[0] for end in ends], values_at, least), ends, strict=True
    ):
        axes.annotate(
            text,
            (1.0, place),
            xycoords="axes fraction",
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9.5,
            annotation_clip=False,
        )


def whiskers(measures: Sequence[Measure]) -> list[list[float]]:
    """The distances of the intervals' ends from the values, as `Axes.errorbar` wants them."""
    return [
        [max(0.0, each.value - each.ends[0]) for each in measures],
        [max(0.0, each.ends[1] - each.value) for each in measures],
    ]
