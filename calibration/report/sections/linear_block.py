"""The linear block: which block a map replaces, by what it costs rather than by how well it fits."""

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from exeunt.calibration.block_choice import BlockChoice, Replacement
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.drawing import SOFT, draw, label_ends, series
from exeunt.calibration.report.parts import Cell, Figure, Section, Table
from exeunt.calibration.report.words import count


def linear_block_section(content: ReportContent) -> Section | None:
    """The section; None where no block was to be replaced."""
    choice = content.choice
    if choice is None:
        return None
    record = content.manifest.linear_block
    chosen = ""
    if record is not None:
        chosen = (
            f"Block {record.index} can be replaced by an affine map of rank {record.rank}: "
            f"{count(record.parameters)} parameters for {count(record.replaced_parameters)}, one for "
            f"{record.replaced_parameters / record.parameters:.0f}. "
        )
    return Section(
        "linear-block",
        "Linear block",
        f"{chosen}R² is the share of the variance of what a block adds that the map explains, on the select "
        f"split under the deployed upstream; perplexities are over {count(choice.tokens)} tokens of it. A "
        "block is chosen by what replacing it costs, not by R².",
        "One block only: replacing several at once is shown to say why.",
        (_by_depth(choice), _table(choice)),
    )


def _by_depth(choice: BlockChoice) -> Figure:
    def paint(axes: Axes) -> None:
        blocks = [fit.block for fit in choice.fits]
        lines = (
            ("full rank", [fit.r2 for fit in choice.fits]),
            (f"rank {choice.fits[0].map.rank}", [fit.r2_cut for fit in choice.fits]),
        )
        for number, (_, values) in enumerate(lines):
            axes.plot(blocks, values, **series(number).look)
        if choice.chosen is not None:
            axes.axvline(choice.chosen.block, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
        axes.set(xlabel="block", ylabel="R²", ylim=(min(0.0, *lines[1][1]) - 0.03, 1.03))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        label_ends(axes, [(values[-1], name, series(n).colour) for n, (name, values) in enumerate(lines)])

    return draw(
        "linearity",
        "R squared of a linear map for each block",
        "How well an affine map stands in for each block. The dotted line is the block that was chosen.",
        paint,
    )


def _table(choice: BlockChoice) -> Table:
    rows = [_row(choice, each) for each in choice.candidates]
    if choice.together is not None:
        rows.append(_row(choice, choice.together))
    return Table(("replaced", "R²", "perplexity", "change"), rows)


def _row(choice: BlockChoice, each: Replacement) -> list[Cell]:
    chosen = choice.chosen is not None and each.blocks == (choice.chosen.block,)
    r2 = {fit.block: fit.r2_cut for fit in choice.fits}
    return [
        Cell(", ".join(f"block {block}" for block in each.blocks), "chosen" if chosen else "", strong=chosen),
        Cell(f"{r2[each.blocks[0]]:.3f}" if len(each.blocks) == 1 else "–"),
        Cell(f"{each.perplexity:.2f}"),
        Cell(f"{each.increase:+.2f}", strong=chosen),
    ]
