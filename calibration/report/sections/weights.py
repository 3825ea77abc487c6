"""INT4 weights: how far they lie from the full ones, layer by layer."""

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.drawing import draw, label_ends, series
from exeunt.calibration.report.parts import Cell, Details, Figure, Section, Table
from exeunt.calibration.weights_int4 import Int4Weights


def weights_section(content: ReportContent) -> Section | None:
    """The section; None for a bundle without INT4 weights."""
    int4 = content.int4
    if int4 is None:
        return None
    return Section(
        "weights",
        "INT4 weights",
        f"Weights are held in four bits; groups of {int4.group_size} inputs share a scale and an offset. The "
        "error of a layer is |W − Ŵ|² over |W|².",
        "The error of weights is not that of the outputs; perplexity decides.",
        (_errors(int4), Details("Every layer", (_table(int4),))),
    )


def _by_name(int4: Int4Weights) -> dict[str, list[tuple[int, float]]]:
    errors: dict[str, list[tuple[int, float]]] = {}
    for (block, name), error in int4.relative_error.items():
        errors.setdefault(name, []).append((block, error))
    return errors


def _errors(int4: Int4Weights) -> Figure:
    def paint(axes: Axes) -> None:
        ends = []
        for number, (name, points) in enumerate(_by_name(int4).items()):
            look = series(number)
            blocks, errors = zip(*points, strict=True)
            axes.plot(blocks, [1000 * error for error in errors], **look.look)
            ends.append((1000 * errors[-1], name.rpartition(".")[2], look.colour))
        axes.set(xlabel="block", ylabel="relative squared error, ‰")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        label_ends(axes, ends)

    return draw(
        "weight-errors",
        "Relative squared error of INT4 weights by block and layer",
        "Squared error over squared weight, in thousandths, for each linear layer.",
        paint,
    )


def _table(int4: Int4Weights) -> Table:
    names = list(_by_name(int4))
    blocks = sorted({block for block, _ in int4.relative_error})
    rows = [
        [Cell(f"block {block}"), *(Cell(f"{1000 * int4.relative_error[block, name]:.2f}") for name in names)]
        for block in blocks
    ]
    return Table(("‰", *names), rows)
