"""Gates: whether what they say is true, and how well they tell tokens that may leave from others."""

from matplotlib.axes import Axes
from scipy import stats

from exeunt.calibration.bootstrap import Measure
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.drawing import SOFT, draw, series, whiskers
from exeunt.calibration.report.parts import Cell, Figure, Section, Table
from exeunt.calibration.report.words import count


def gates_section(content: ReportContent) -> Section | None:
    """The section; None where no exit was kept."""
    if not content.exits:
        return None
    tokens = max(each.gate.tokens for each in content.exits)
    return Section(
        "gates",
        "Gates",
        f"A gate says with which probability its exit's token is full depth's; all on {count(tokens)} tokens of the "
        "select split. On the diagonal of the first picture a gate is right about itself. AUC is the chance that it "
        "puts an agreeing token above a disagreeing one.",
        "The regression that joins a gate's parts was fitted on the same split; certificates do not rely on it being "
        "calibrated, they are counted on text that gates never saw.",
        (_reliability(content), _table(content)),
    )


def _reliability(content: ReportContent) -> Figure:
    def paint(axes: Axes) -> None:
        axes.plot([0, 100], [0, 100], color=SOFT, linewidth=1)
        for number, each in enumerate(content.exits):
            said, was, tokens = zip(*each.gate.reliability, strict=True)
            measures = [_agreement(value, count) for value, count in zip(was, tokens, strict=True)]
            axes.errorbar(
                [100 * value for value in said],
                [measure.value for measure in measures],
                yerr=whiskers(measures),
                **series(number).look,
                elinewidth=1.0,
                label=each.head.name,
            )
        axes.set(
            xlabel="gate's probability, %",
            ylabel="share that agrees, %",
            xlim=(0, 100),
            ylim=(0, 100),
            aspect="equal",
        )
        axes.legend(loc="upper left")

    return draw(
        "reliability",
        "Reliability of the gates",
        "What gates say against what happens, by tenths of their probability, with Wilson's 95 % intervals, "
        "which take tokens as independent.",
        paint,
        height=3.8,
    )


def _agreement(agrees: float, tokens: int) -> Measure:
    """A share in per cent with Wilson's interval, which takes tokens as independent."""
    found = stats.binomtest(round(agrees * tokens), tokens).proportion_ci(method="wilson")
    return Measure(100 * agrees, 100 * float(found.low), 100 * float(found.high))


def _table(content: ReportContent) -> Table:
    headers = ("exit", "AUC", "probe alone", "top probability alone", "calibration error")
    return Table(
        headers,
        [
            [
                Cell(each.head.name),
                Cell(f"{each.gate.auc:.3f}", strong=True),
                Cell(f"{each.gate.auc_probe:.3f}"),
                Cell(f"{each.gate.auc_top:.3f}"),
                Cell(f"{each.gate.calibration_error:.3f}"),
            ]
            for each in content.exits
        ],
    )
