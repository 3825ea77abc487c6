"""Drafting: which exit proposes tokens in the verified mode, and what that is expected to be worth."""

from matplotlib.axes import Axes

from exeunt.calibration.drafting_choice import DraftPlan
from exeunt.calibration.exit_records import FittedExit
from exeunt.calibration.exit_selection import Drafting
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.drawing import INK, draw, series
from exeunt.calibration.report.parts import Cell, Figure, Section, Table
from exeunt.calibration.report.words import share


def drafting_section(content: ReportContent) -> Section | None:
    """The section; None where no exit drafts."""
    drafting = content.selection.drafting
    if drafting is None:
        return None
    return Section(
        "drafting",
        "Drafts",
        "In the verified mode an exit drafts tokens and full depth confirms them: the output is that of exits "
        "off, to the token. For each candidate the threshold of its gate and the longest draft that are "
        "expected to be fastest with one stream, from shares counted on the select split and the times of "
        "passes measured on the machine that calibrated.",
        "The figure takes tokens as independent and drafts as greedy, and knows neither the server's own costs "
        "nor other streams. Below 1 drafts are not expected to pay on that machine; the server finds out by "
        "itself, request by request.",
        (_speeds(drafting), _table(drafting, content.manifest.base_model.blocks)),
    )


def _pairs(drafting: Drafting) -> list[tuple[FittedExit, DraftPlan]]:
    return list(zip(drafting.candidates, drafting.choice.plans, strict=True))


def _speeds(drafting: Drafting) -> Figure:
    def paint(axes: Axes) -> None:
        pairs = _pairs(drafting)
        look = series(0)
        axes.axhline(1.0, color=INK, linewidth=1)
        axes.plot([each.head.block for each, _ in pairs], [plan.speed for _, plan in pairs], **look.look)
        chosen = drafting.exit.head.block
        axes.plot([chosen], [drafting.choice.plan.speed], "o", ms=11, mfc="none", mew=1.6, color=look.colour)
        for each, plan in pairs:
            axes.annotate(
                f"{plan.speed:.2f}×",
                (each.head.block, plan.speed),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                fontsize=9.5,
                color=look.colour,
            )
        speeds = [1.0, *(plan.speed for _, plan in pairs)]
        room = 0.25 * (max(speeds) - min(speeds)) + 0.02
        axes.margins(x=0.1)
        axes.set_ylim(min(speeds) - room, max(speeds) + room)
        axes.set(
            xlabel="drafting exit after block",
            ylabel="expected speed, × no drafts",
            xticks=[each.head.block for each, _ in pairs],
        )

    return draw(
        "drafting",
        "Expected speed with drafts from each exit",
        "Expected speed of one stream with the best draft rule at each exit, over that without drafts. The "
        "ring marks the exit that drafts.",
        paint,
    )


def _table(drafting: Drafting, blocks: int) -> Table:
    headers = ("exit", "depth", "threshold", "longest draft", "drafted", "of them right", "expected speed")
    return Table(headers, [_row(drafting, each, plan, blocks) for each, plan in _pairs(drafting)])


def _row(drafting: Drafting, each: FittedExit, plan: DraftPlan, blocks: int) -> list[Cell]:
    chosen = each is drafting.exit
    return [
        Cell(each.head.name, "chosen" if chosen else "", strong=chosen),
        Cell(f"{each.head.depth} of {blocks}"),
        Cell(f"{plan.rates.threshold:.4f}"),
        Cell(f"{plan.length}"),
        Cell(share(plan.rates.drafted)),
        Cell(share(plan.rates.acceptance)),
        Cell(f"{plan.speed:.2f}×", tone="good" if plan.speed > 1 else "fair", strong=chosen),
    ]
