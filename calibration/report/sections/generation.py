"""Generation: what modes write when they are let run, and what the full model thinks of it."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from exeunt.calibration.evaluation_table import Mode
from exeunt.calibration.generation import REPEATED, Written
from exeunt.calibration.report.charts import Line, forest, forest_height
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.drawing import draw, series
from exeunt.calibration.report.parts import Cell, Details, Figure, Listing, Section, Table
from exeunt.calibration.report.words import measured, measured_share, share, variant_name
from exeunt.calibration.risk import percent


def generation_section(content: ReportContent) -> Section | None:
    """The section; None where modes were not let write."""
    written = content.written
    if not written:
        return None
    samples = tuple(
        Details(f"What they wrote, {_temperature(temperature)}", _samples(written, temperature))
        for temperature in dict.fromkeys(each.temperature for each in written)
    )
    return Section(
        "generation",
        "What they write",
        "Here each token follows the mode's own, so that errors may build on each other. All modes go on from "
        "the same beginnings with the same randomness; the first mode, the reference, reads what was written "
        "and says how likely it finds it. A perplexity near the reference's own is a text that it might have written.",
        "A text that repeats itself is easy to predict, so that a low perplexity alone proves nothing: the share of "
        f"runs of {REPEATED} tokens that stood there before stands beside it. One sample is no measurement.",
        (_perplexities(written), _table(written), *samples),
    )


def mode_words(mode: Mode) -> str:
    """A mode in a few words: its savings, then its exits."""
    return ", ".join(part for part in (variant_name(mode.variant), _exits(mode)) if part)


def _exits(mode: Mode) -> str:
    """A mode's exits; nothing where they are off."""
    if mode.threshold is None:
        return ""
    exits = f"exits from {mode.threshold:.2f}" if mode.target is None else f"exits at {percent(mode.target)}"
    return f"{exits}, {mode.skipped_kv}"


def _temperature(temperature: float) -> str:
    return "most likely tokens" if temperature == 0 else f"temperature {temperature:g}"


def _perplexities(written: Sequence[Written]) -> Figure:
    temperatures = list(dict.fromkeys(each.temperature for each in written))

    names = dict.fromkeys(mode_words(each.mode) for each in written)

    def paint(axes: Axes) -> None:
        lines = [
            Line(mode_words(each.mode), each.perplexity, temperatures.index(each.temperature))
            for each in written
        ]
        forest(axes, lines, zero=None, form="{:.1f}")
        axes.set_xlabel("perplexity by the reference")
        for number, temperature in enumerate(temperatures):
            look = series(number)
            axes.plot([], [], look.marker, color=look.colour, label=_temperature(temperature))
        top, bottom = -0.8 - 0.45 * len(temperatures), axes.get_ylim()[0]
        axes.set_ylim(bottom, top)
        axes.legend(loc="upper right")

    return draw(
        "generation",
        "Perplexity that the full model gives to what each mode writes",
        "What the reference thinks of each mode's texts, with 95 % intervals over texts; a mark for each way "
        "of choosing tokens.",
        paint,
        height=forest_height(len(names) + 1),
    )


def _table(written: Sequence[Written]) -> Table:
    headers = ("mode", "tokens", "perplexity", "repeated", "distinct pairs", "mean depth", "leave early")
    rows = [
        [
            Cell(variant_name(each.mode.variant), _exits(each.mode)),
            Cell(_temperature(each.temperature)),
            measured(each.perplexity),
            Cell(share(each.repeated)),
            Cell(share(each.distinct)),
            measured(each.mean_depth),
            measured_share(each.exit_rate),
        ]
        for each in written
    ]
    return Table(headers, rows, words=2)


def _samples(written: Sequence[Written], temperature: float) -> tuple[Listing, ...]:
    own = [each for each in written if each.temperature == temperature]
    return (
        Listing(own[0].prompt, "all go on from"),
        *(Listing(each.sample, mode_words(each.mode)) for each in own),
    )
