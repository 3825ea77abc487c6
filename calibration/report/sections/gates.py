"""Gates: whether what they say is true, and how well they tell tokens that may leave from others."""

from collections.abc import Callable

from matplotlib.axes import Axes
from scipy import stats

from exeunt.calibration.bootstrap import Measure
from exeunt.calibration.exit_records import FittedExit
from exeunt.calibration.gate_quality import Curve, GateQuality
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.drawing import SOFT, draw, label_ends, series, whiskers
from exeunt.calibration.report.parts import Cell, Figure, Section, Table
from exeunt.calibration.report.words import NOTHING, count, share
from exeunt.calibration.risk import percent


def gates_section(content: ReportContent) -> Section | None:
    """The section; None where no exit was kept."""
    if not content.exits:
        return None
    figures = [_reliability(content)]
    if any(each.gate.roc for each in content.exits):
        figures.append(_roc(content))
    if any(each.gate.coverage for each in content.exits):
        figures.append(_coverage(content))
    tokens = max(each.gate.tokens for each in content.exits)
    steps = (
        " A gate asks in steps, each of which may turn a token away: a small probe of its state; then the logits, "
        "where there is a shortlist those of its tokens, which full depth says most often, and then, of who passes, "
        "all of them, which confirm it and are what a token says that leaves. The last step decides."
    )
    return Section(
        "gates",
        "Gates",
        f"A gate says with which probability its exit's token is full depth's; all on {count(tokens)} tokens of the "
        "select split. On the diagonal of the first picture a gate is right about itself. AUC, the area below the "
        "second, is the chance that it puts an agreeing token above a disagreeing one; the third lets tokens go, "
        f"surest first, and counts those that differ.{steps}",
        "The split chose between heads, and each half of it is judged by a regression of the gate's parts that was "
        "fitted on the other half: figures lean to the good side. Certificates do not rely on a gate being calibrated, "
        "they are counted on text that gates never saw.",
        (*figures, _table(content), *_shares(content)),
    )


def _reliability(content: ReportContent) -> Figure:
    def paint(axes: Axes) -> None:
        axes.plot([0, 100], [0, 100], color=SOFT, linewidth=1)
        for number, each in enumerate(content.exits):
            said, was, tokens = zip(*each.gate.reliability, strict=True)
            measures = [_agreement(value, seen) for value, seen in zip(was, tokens, strict=True)]
            axes.errorbar(
                [100 * value for value in said],
                [measure.value for measure in measures],
                yerr=whiskers(measures),
                **series(number).look,
                elinewidth=1.0,
                label=each.head.name,
            )
        axes.set(xlabel="gate's probability, %", ylabel="share that agrees, %", xlim=(0, 100), ylim=(0, 100))
        axes.set_aspect("equal")
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


def _curves(axes: Axes, content: ReportContent, curve: Callable[[GateQuality], Curve]) -> None:
    for number, each in enumerate(content.exits):
        points = curve(each.gate)
        look = series(number)
        axes.plot(
            [100 * x for x, _ in points],
            [100 * y for _, y in points],
            color=look.colour,
            linestyle=look.line,
            label=each.head.name,
        )


def _roc(content: ReportContent) -> Figure:
    def paint(axes: Axes) -> None:
        axes.plot([0, 100], [0, 100], color=SOFT, linewidth=1)
        _curves(axes, content, lambda gate: gate.roc)
        axes.set(
            xlabel="of the differing tokens, %",
            ylabel="of the agreeing tokens, %",
            xlim=(0, 100),
            ylim=(0, 100),
        )
        axes.set_aspect("equal")
        axes.legend(loc="lower right")

    areas = ", ".join(f"{each.head.name} {each.gate.auc:.3f}" for each in content.exits)
    return draw(
        "roc",
        "Receiver operating characteristic of the gates",
        f"Shares that a threshold lets go, of agreeing and of differing tokens; the diagonal is a coin. Area: {areas}.",
        paint,
        height=3.8,
    )


def _coverage(content: ReportContent) -> Figure:
    targets = list(content.selection.plan.begins)

    def paint(axes: Axes) -> None:
        _curves(axes, content, lambda gate: gate.coverage)
        axes.set(xlabel="tokens let go, surest first, %", ylabel="of them differ, %", xlim=(0, 100))
        most = max((risk for each in content.exits for _, risk in each.gate.coverage), default=0.0)
        axes.set_ylim(0, 105 * max(most, *targets, 0.01))  # the targets too, where hardly a token differs
        for target in targets:
            axes.axhline(100 * target, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
        label_ends(axes, [(100 * target, percent(target), SOFT) for target in targets])
        axes.legend(loc="upper left")

    return draw(
        "coverage",
        "Disagreement against the share of tokens let go, surest first",
        "Risk by coverage: each exit alone, every token asked. Dotted lines are the risk targets; where a "
        "curve crosses one, so many tokens could leave if the gate were all there is.",
        paint,
        height=3.4,
    )


def within(curve: Curve, target: float) -> float:
    """The largest share of the tokens on the curve at which the risk is within `target`; 0 where it never is."""
    return max((covered for covered, risk in curve if risk <= target), default=0.0)


def _table(content: ReportContent) -> Table:
    targets = list(content.selection.plan.begins)
    headers = ("exit", "AUC", "probe alone", "top probability alone", "calibration error", "looks at")
    rows = [
        [
            Cell(each.head.name),
            Cell(f"{each.gate.auc:.3f}", strong=True),
            Cell(f"{each.gate.auc_probe:.3f}"),
            Cell(f"{each.gate.auc_top:.3f}"),
            Cell(f"{each.gate.calibration_error:.3f}"),
            Cell(_looks_at(each)),
            *(
                Cell(share(within(each.gate.coverage, target)) if each.gate.coverage else NOTHING)
                for target in targets
            ),
        ]
        for each in content.exits
    ]
    return Table((*headers, *(f"within {percent(target)}" for target in targets)), rows)


def _looks_at(each: FittedExit) -> str:
    """What an exit's gate decides by, in words."""
    if each.head.shortlist is None:
        return "the whole vocabulary"
    listed = f"a shortlist of {count(len(each.head.shortlist))} tokens"
    if each.head.confirmation is None:
        return listed
    alone = "" if each.gate.auc_listed is None else f" (AUC {each.gate.auc_listed:.3f})"
    return (
        f"{listed}{alone}; of who reaches {each.head.confirmation.list_ratio:g} × the threshold there, at all"
    )


def _shares(content: ReportContent) -> tuple[Table, ...]:
    """How far tokens get in the gates of the certified exits; nothing where no threshold was planned."""
    shares = content.selection.shares
    if not shares:
        return ()
    headers = ("threshold", "gates asked", "past the probe", "all logits asked", "leave")
    rows = [
        [
            Cell(f"{each.threshold:.3f}"),
            Cell(f"{each.asked:.2f}"),
            Cell(share(each.looked)),
            Cell(share(each.whole)),
            Cell(share(each.left)),
        ]
        for each in shares
    ]
    caption = "Per token that may leave, all certified exits together, on the select split"
    return (Table(headers, rows, caption=caption),)
