"""The report's pictures: colours that everybody can tell apart on both pages, labels that do not lie on one another."""

import itertools
import re

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from exeunt.calibration.bootstrap import Measure
from exeunt.calibration.report.drawing import DARK, LIGHT, SERIES, draw, series, spread, whiskers

Colour = NDArray[np.float64]
# Viénot, Brettel and Mollon (Color Research and Application 24, 1999): linear RGB as dichromats see it.
BLIND = {
    "protanopia": np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]]),
    "deuteranopia": np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]]),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> Colour:
    values = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(colour: str, other: str) -> float:
    """The contrast ratio of WCAG 2."""
    light, dark = sorted((float(TO_XYZ[1] @ linear(each)) for each in (colour, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def lab(rgb: Colour) -> Colour:
    """CIE L*a*b* of linear RGB."""
    x, y, z = TO_XYZ @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = [t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z)]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_everything_stands_out_from_the_page(scheme: dict[str, str]) -> None:
    for name in ("ink", "soft", "good", "bad"):
        assert contrast(scheme[name], scheme["paper"]) >= 4.5, name
    for number in range(1, len(SERIES) + 1):
        assert contrast(scheme[f"series-{number}"], scheme["paper"]) >= 3.0, number


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("eyes", ["protanopia", "deuteranopia"])
def test_the_colour_blind_can_tell_lines_apart(scheme: dict[str, str], eyes: str) -> None:
    seen = {n: lab(BLIND[eyes] @ linear(scheme[f"series-{n}"])) for n in range(1, len(SERIES) + 1)}
    for first, second in itertools.combinations(seen, 2):
        distance = float(np.linalg.norm(seen[first] - seen[second]))
        assert distance >= 12, (first, second, distance)


def test_lines_differ_by_more_than_colour() -> None:
    looks = [(series(number).marker, str(series(number).line)) for number in range(6)]
    assert len(set(looks)) == 6
    assert series(0) != series(6)


def test_labels_are_moved_apart_and_stay_in_order() -> None:
    axes = Canvas().add_subplot()
    axes.set_ylim(0, 10)
    values = [5.0, 5.1, 0.0, 5.05]
    places = spread(axes, values, least=0.1)
    assert places[2] == 0.0
    assert np.argsort(places).tolist() == np.argsort(values).tolist()
    assert np.diff(sorted(places)).min() >= 0.1 - 1e-6
    assert np.mean([places[0], places[1], places[3]]) == pytest.approx(0.505)


def test_a_picture_is_one_element_in_the_pages_colours() -> None:
    def paint(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], **series(0).look)
        axes.set_xlabel("a & b <c>, 0.12345")

    figure = draw("some-name", 'says "this" & that', "caption", paint)
    assert figure.svg.startswith(
        '<svg id="figure-some-name" role="img" aria-label="says &quot;this&quot; &amp; that"'
    )
    assert figure.svg.count("<svg") == figure.svg.count("</svg>") == 1
    assert "a &amp; b &lt;c&gt;, 0.12345" in figure.svg
    assert not re.search(r"#[0-9a-f]{6}\b", figure.svg)
    assert re.findall(r' [xy]="[^"]*"', figure.svg)
    assert not re.search(r"<[^>]*\d\.\d{3}", figure.svg)
    assert figure.svg == draw("some-name", 'says "this" & that', "caption", paint).svg


def test_whiskers_are_distances_to_the_ends() -> None:
    low, high = whiskers([Measure(1.0, 0.25, 3.0), Measure(2.0, 2.0, 2.0)])
    assert low == [0.75, 0.0]
    assert high == [2.0, 0.0]


def test_a_picture_without_room_for_its_names_is_drawn_all_the_same() -> None:
    def paint(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1])
        axes.set_ylabel("name " * 60)
        axes.set_xlabel("\n" * 60)

    assert "<svg" in draw("crowded", "A picture of very long names", "Nothing.", paint).svg
