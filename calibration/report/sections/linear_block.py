"""The linear block: which block a map replaces, by its cost rather than by its fit, and how large the map is."""

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from exeunt.calibration.block_choice import BlockChoice, Replacement
from exeunt.calibration.papers import LINEAR_REDUCTION
from exeunt.calibration.rank_sweep import RankPoint, RankSweep
from exeunt.calibration.report.charts import Line, forest, forest_height
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.drawing import INK, SOFT, draw, label_ends, series, whiskers
from exeunt.calibration.report.parts import Cell, Figure, Section, Table
from exeunt.calibration.report.words import NOTHING, count, measured


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
    figures: list[Figure] = [_by_depth(choice), _costs(choice)]
    tables = [_table(choice)]
    if len(choice.candidates) > 1:
        figures.append(_cost_against_fit(choice))
    if content.rank_sweep is not None and content.rank_sweep.points:
        figures.append(_sweep(content.rank_sweep))
        tables.append(_sweep_table(content.rank_sweep))
    return Section(
        "linear-block",
        "Linear block",
        f"{chosen}R² is the share of the variance of what a block adds that the map explains, on the select split "
        f"under the deployed upstream; perplexities are over {count(choice.tokens)} tokens of it, with the savings "
        "that are deployed. A block is chosen by what replacing it costs, not by R².",
        "One block only: replacing several at once is shown to say why. Of blocks that were not candidates the cost "
        "was not measured.",
        (*figures, *tables),
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


def _costs(choice: BlockChoice) -> Figure:
    several = [] if choice.together is None else [choice.together]

    def paint(axes: Axes) -> None:
        alone = [
            Line(_name(each), each.increase, int(_is_chosen(choice, each))) for each in choice.candidates
        ]
        forest(
            axes, [*alone, *(Line(f"{_name(each)} at once", each.increase, 2) for each in several)], clip=True
        )
        axes.set_xlabel("change of perplexity")

    return draw(
        "linear-costs",
        "Increase of perplexity where blocks are replaced by linear maps, alone and several at once",
        "What replacing each candidate costs, with 95 % intervals; the block that was chosen has its own mark. "
        "The last line replaces several at once.",
        paint,
        height=forest_height(len(choice.candidates) + len(several)),
    )


def _cost_against_fit(choice: BlockChoice) -> Figure:
    fits = {fit.block: fit for fit in choice.fits}

    def paint(axes: Axes) -> None:
        for each in choice.candidates:
            look = series(int(_is_chosen(choice, each)))
            at = fits[each.blocks[0]].r2_cut
            axes.errorbar(
                [at],
                [each.increase.value],
                yerr=whiskers([each.increase]),
                marker=look.marker,
                color=look.colour,
                linestyle="",
                capsize=3,
            )
            axes.annotate(
                f"{each.blocks[0]}",
                (at, each.increase.value),
                xytext=(7, 3),
                textcoords="offset points",
                fontsize=9.5,
                color=look.colour,
            )
        axes.margins(x=0.12)
        axes.set(xlabel="R² of the map within the size budget", ylabel="change of perplexity")
        values = sorted(each.increase.value for each in choice.candidates)
        if values[0] > 0 and values[-1] > 8 * values[0]:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axes.axhline(0.0, color=INK, linewidth=1)

    return draw(
        "linear-fit",
        "What replacing a block costs against how well a map fits it",
        "Each candidate by its block's number: a good fit is not a low cost, which is why costs are measured.",
        paint,
    )


def _sweep(sweep: RankSweep) -> Figure:
    def paint(axes: Axes) -> None:
        points, look = sweep.points, series(0)
        axes.errorbar(
            [point.reduction for point in points],
            [point.increase.value for point in points],
            yerr=whiskers([point.increase for point in points]),
            **look.look,
            capsize=3,
            elinewidth=1.1,
        )
        marked = _marked(sweep)
        axes.plot(
            [marked.reduction],
            [marked.increase.value],
            "o",
            ms=11,
            mfc="none",
            mew=1.6,
            color=series(1).colour,
        )
        axes.annotate(
            f"{marked.reduction:.0f}×, rank {marked.rank}",
            (marked.reduction, marked.increase.ends[1]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=9.5,
            color=series(1).colour,
        )
        axes.axhline(0.0, color=INK, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(
            [p.reduction for p in points], [f"{p.reduction:.1f}×".replace(".0×", "×") for p in points]
        )
        axes.minorticks_off()
        axes.margins(x=0.1, y=0.16)
        axes.set(xlabel="times smaller than the block", ylabel="change of perplexity")

    return draw(
        "rank-sweep",
        "Increase of perplexity against the size of the linear map",
        f"Block {sweep.block} as a map of falling rank, with 95 % intervals. The ring is the size that is "
        f"deployed, at least {LINEAR_REDUCTION} times smaller as in the paper.",
        paint,
    )


def _marked(sweep: RankSweep) -> RankPoint:
    """The point of the paper's ratio: the largest map that is at least so many times smaller than the block."""
    small = [point for point in sweep.points if point.reduction >= LINEAR_REDUCTION]
    return max(small or sweep.points, key=lambda point: point.parameters)


def _is_chosen(choice: BlockChoice, each: Replacement) -> bool:
    return choice.chosen is not None and each.blocks == (choice.chosen.block,)


def _name(each: Replacement) -> str:
    blocks = [f"{block}" for block in each.blocks]
    return f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {', '.join(blocks[:-1])} and {blocks[-1]}"


def _table(choice: BlockChoice) -> Table:
    rows = [_row(choice, each) for each in choice.candidates]
    if choice.together is not None:
        rows.append(_row(choice, choice.together))
    return Table(("replaced", "R²", "perplexity", "change"), rows)


def _row(choice: BlockChoice, each: Replacement) -> list[Cell]:
    chosen = _is_chosen(choice, each)
    r2 = {fit.block: fit.r2_cut for fit in choice.fits}
    return [
        Cell(_name(each), "chosen" if chosen else "", strong=chosen),
        Cell(f"{r2[each.blocks[0]]:.3f}" if len(each.blocks) == 1 else NOTHING),
        measured(each.perplexity),
        measured(each.increase, "{:+.2f}"),
    ]


def _sweep_table(sweep: RankSweep) -> Table:
    marked = _marked(sweep)
    rows = [
        [
            Cell(f"{point.rank}", "deployed" if point is marked else "", strong=point is marked),
            Cell(count(point.parameters)),
            Cell(f"{point.reduction:.1f}×"),
            Cell(f"{point.r2:.3f}"),
            measured(point.perplexity),
            measured(point.increase, "{:+.2f}"),
        ]
        for point in sweep.points
    ]
    headers = ("rank", "parameters", "smaller", "R²", "perplexity", "change")
    return Table(headers, rows, caption=f"Block {sweep.block} by rank, on {count(sweep.tokens)} tokens")
