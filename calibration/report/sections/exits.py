"""Exits: where they stand, how much they agree with full depth before and after training, and which were kept."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from exeunt.calibration.exit_fit import FittedExit
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.drawing import draw, label_ends, series
from exeunt.calibration.report.parts import Cell, Figure, Section, Table, Text
from exeunt.calibration.report.words import count, share


def exits_section(content: ReportContent) -> Section | None:
    """The section; None where no exit was fitted."""
    if not content.candidates:
        return None
    parts: list[Figure | Table | Text] = [_agreement_plot(content), _table(content)]
    costs = content.selection.costs
    if costs is not None:
        parts.append(
            Text(
                f"Measured on the machine that calibrated, in units of one block: a gate costs {costs.gate:.2f}, a "
                f"projection onto the vocabulary {costs.projection:.2f}, the keys and values of a skipped block "
                f"{costs.skipped_kv:.2f}.",
                "soft",
            )
        )
    tokens = max(each.gate.tokens for each in content.candidates)
    return Section(
        "exits",
        "Exits",
        f"Every exit that was fitted, and its agreement with full depth on the select split ({count(tokens)} tokens): "
        "the share of tokens on which its top token is the deployed full-depth model's own. Training stopped where "
        "that was best. Tokens of the approximate mode may leave at the certified exits; in the verified mode one "
        "exit drafts.",
        "Agreement is not safety: an exit that agrees on half the tokens may let only a few leave, which is "
        "what gates and certificates decide.",
        tuple(parts),
    )


def _agreement_plot(content: ReportContent) -> Figure:
    exits = content.candidates

    def paint(axes: Axes) -> None:
        blocks = [each.head.block for each in exits]
        lines = (
            ("trained head", [each.training.agreement for each in exits]),
            ("ridge adapter", [each.training.ridge_agreement for each in exits]),
            ("model's own head", [each.training.untrained_agreement for each in exits]),
        )
        for number, (_, values) in enumerate(lines):
            axes.plot(blocks, [100 * value for value in values], **series(number).look)
        kept = [each for each in exits if each in content.exits]
        axes.plot(
            [each.head.block for each in kept],
            [100 * each.training.agreement for each in kept],
            "o",
            ms=11,
            mfc="none",
            mew=1.6,
            color=series(0).colour,
        )
        axes.set(xlabel="exit after block", ylabel="agreement, %", ylim=(0, 100), xticks=blocks)
        label_ends(
            axes,
            [(100 * values[-1], name, series(number).colour) for number, (name, values) in enumerate(lines)],
        )

    return draw(
        "agreement",
        "Agreement with full depth at each exit, before and after training",
        "Top-1 agreement with full depth by depth of the exit. Rings mark the exits that were kept.",
        paint,
    )


def _table(content: ReportContent) -> Table:
    headers = ("exit", "kept for", "own head", "ridge", "trained", "gate's AUC")
    return Table(headers, [_row(content, each) for each in _in_order(content.candidates)], words=2)


def _in_order(exits: Sequence[FittedExit]) -> list[FittedExit]:
    return sorted(exits, key=lambda each: each.head.block)


def _row(content: ReportContent, each: FittedExit) -> list[Cell]:
    kept = each in content.exits
    return [
        Cell(each.head.name, strong=kept),
        Cell(content.use(each) if kept else "left out", tone="" if kept else "soft"),
        Cell(share(each.training.untrained_agreement)),
        Cell(share(each.training.ridge_agreement)),
        Cell(share(each.training.agreement), strong=kept),
        Cell(f"{each.gate.auc:.3f}"),
    ]
