"""The trade-off: what tokens that leave early cost in perplexity for the compute they save, beside the paper's."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from exeunt.calibration.evaluation import ModeResult
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.drawing import INK, SOFT, draw, series, whiskers
from exeunt.calibration.report.papers import EXITS_PERPLEXITY, EXITS_TRADE_OFF, exits_ratio
from exeunt.calibration.report.parts import Cell, Details, Figure, Section, Table
from exeunt.calibration.report.words import count, measured, measured_share, share, variant_name
from exeunt.calibration.risk import percent
from exeunt.compression.variant import Variant


def trade_off_section(content: ReportContent) -> Section | None:
    """The section; None where no mode lets tokens leave."""
    variant, points = trade_off_points(content)
    if variant is None or not points:
        return None
    return Section(
        "trade-off",
        "What leaving early costs",
        f"{_opening(points)} Perplexity is over that of the same savings with exits off, compute is the share "
        "of full depth's multiply-accumulates that are not done, net of gates, projections and the keys and "
        f"values of skipped blocks; {count(content.table.tokens)} tokens. Points are thresholds, loosest to "
        "the right; larger ones are certified.",
        "The paper's curve is another model on other data: the shapes are to be compared, in relative terms. "
        "Skipped keys and values are propagated; with backfill no compute is saved but passes. Perplexity is "
        "measured, not certified.",
        (_picture(variant, points), Details("Every point", (_table(points), _paper_table()))),
    )


def trade_off_points(content: ReportContent) -> tuple[Variant | None, list[ModeResult]]:
    """The variant that exits were fitted on, and its modes with propagated exits, least saved first."""
    propagated = [
        result
        for result in (*content.table.results, *content.table.sweep)
        if result.mode.threshold is not None and result.mode.skipped_kv == "propagate"
    ]
    if not propagated:
        return None, []
    of_sweep = [result.mode.variant for result in content.table.sweep if result in propagated]
    variants = dict.fromkeys(of_sweep or [result.mode.variant for result in propagated])
    variant = max(
        variants, key=lambda each: (each.weights == "int4") + (each.kv_cache == "int4") - each.linear_block
    )
    own = [
        result for result in propagated if result.mode.variant == variant and result.exits_ratio is not None
    ]
    return variant, sorted(own, key=lambda result: result.compute_saved.value)


def _opening(points: Sequence[ModeResult]) -> str:
    certified = [each for each in points if each.mode.target is not None and each.compute_saved.value > 0]
    best = max(certified or points, key=lambda each: each.compute_saved.value)
    if best.compute_saved.value <= 0 or best.exits_ratio is None:
        return "No threshold saves compute here: gates and projections cost more than the skipped blocks."
    of = (
        f"certified to differ on at most {percent(best.mode.target)}"
        if best.mode.target
        else "at the loosest threshold"
    )
    line = (
        f"With exits {of}, {share(best.compute_saved.value)} of the compute is saved for "
        f"{100 * (best.exits_ratio.value - 1):+.1f} % perplexity"
    )
    paper = exits_ratio(best.compute_saved.value)
    return line + (
        "." if paper is None else f"; the paper's routing pays {100 * (paper - 1):+.0f} % for as much."
    )


def _picture(variant: Variant, points: Sequence[ModeResult]) -> Figure:
    def paint(axes: Axes) -> None:
        ours, paper = series(0), series(1)
        ratios = [each.exits_ratio for each in points if each.exits_ratio is not None]
        saved = [100 * each.compute_saved.value for each in points]
        axes.axhline(1.0, color=INK, linewidth=1)
        axes.axvline(0.0, color=SOFT, linewidth=0.8)
        axes.errorbar(
            saved,
            [each.value for each in ratios],
            xerr=[[100 * end for end in ends] for ends in whiskers([each.compute_saved for each in points])],
            yerr=whiskers(ratios),
            color=ours.colour,
            marker=ours.marker,
            markersize=4,
            elinewidth=0.9,
        )
        for each, at, ratio in zip(points, saved, ratios, strict=True):
            if each.mode.target is not None:
                axes.plot([at], [ratio.value], marker="o", ms=8, color=ours.colour)
                axes.annotate(
                    percent(each.mode.target),
                    (at, ratio.value),
                    xytext=(0, -15),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                    color=ours.colour,
                )
        shares = [100 * share for share, _ in EXITS_TRADE_OFF]
        theirs = [1 + increase / EXITS_PERPLEXITY for _, increase in EXITS_TRADE_OFF]
        axes.plot([0, *shares], [1, *theirs], **paper.look)
        axes.annotate(
            "softmax routing,\nMistral 7B (paper)",
            (shares[1], theirs[1]),
            xytext=(-6, 8),
            textcoords="offset points",
            ha="right",
            fontsize=9.5,
            color=paper.colour,
        )
        axes.annotate(
            "this bundle",
            (saved[-1], ratios[-1].value),
            xytext=(8, 2),
            textcoords="offset points",
            fontsize=9.5,
            color=ours.colour,
        )
        _logarithmic(axes, max(theirs[-1], *(each.high for each in ratios)), min(each.low for each in ratios))
        axes.set(xlabel="compute saved, % of full depth", ylabel="perplexity, × exits off")
        left, right = axes.get_xlim()
        axes.set_xlim(
            left, max(right, saved[-1] + 0.3 * (right - left)) if saved[-1] > 0.7 * right else right
        )

    return draw(
        "trade-off",
        "Perplexity against compute saved, beside the paper's curve",
        f"{variant_name(variant)}: perplexity, as a multiple of that with exits off, against the compute "
        "saved, with 95 % intervals; the axis of perplexity is logarithmic. Lower and further right is better.",
        paint,
        height=3.5,
    )


def _logarithmic(axes: Axes, high: float, low: float) -> None:
    """A logarithmic y axis of multiples with round ticks."""
    axes.set_yscale("log")
    axes.set_ylim(min(0.95, low * 0.97), high * 1.12)
    ticks = [
        tick
        for tick in (0.9, 1.0, 1.1, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
        if low * 0.95 <= tick <= high * 1.12
    ]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _table(points: Sequence[ModeResult]) -> Table:
    headers = (
        "threshold",
        "certified",
        "compute saved",
        "passes saved",
        "leave early",
        "of them differ",
        "perplexity",
    )
    return Table(
        headers, [_row(each) for each in points], caption="This bundle; perplexity over that with exits off"
    )


def _row(result: ModeResult) -> list[Cell]:
    ratio = result.exits_ratio
    return [
        Cell("–" if result.mode.threshold is None else f"{result.mode.threshold:.4f}"),
        Cell("no" if result.mode.target is None else f"at {percent(result.mode.target)}"),
        measured_share(result.compute_saved),
        measured_share(result.passes_saved),
        measured_share(result.exit_rate),
        measured_share(result.disagreement),
        measured(ratio, "{:.3f} ×"),
    ]


def _paper_table() -> Table:
    rows = [
        [share(saved), f"{EXITS_PERPLEXITY + increase:.2f}", f"{1 + increase / EXITS_PERPLEXITY:.3f} ×"]
        for saved, increase in EXITS_TRADE_OFF
    ]
    caption = f"Softmax routing on Mistral 7B, perplexity {EXITS_PERPLEXITY} (arXiv 2604.20682)"
    return Table(("compute saved", "perplexity", "over full depth"), rows, words=0, caption=caption)
