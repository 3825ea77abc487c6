"""The trade-off: what tokens that leave early cost in perplexity for what they save, beside the paper's curve."""

from collections.abc import Sequence
from typing import Final

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from exeunt.calibration.bootstrap import Measure
from exeunt.calibration.evaluation import ModeResult
from exeunt.calibration.papers import EXITS_PERPLEXITY, EXITS_TRADE_OFF
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.drawing import INK, Series, draw, series, whiskers
from exeunt.calibration.report.parts import Cell, Details, Figure, Section, Table, Text
from exeunt.calibration.report.words import (
    count,
    measured,
    measured_share,
    promised,
    share,
    skipped_name,
    variant_name,
)
from exeunt.calibration.risk import percent
from exeunt.calibration.trade_off import TradeCurve, TradeOff, trade_offs
from exeunt.compression.variant import Variant

_COUNTED: Final = (
    "Perplexity is over that of the same savings with exits off. Layers skipped are the share of layers that "
    "tokens did not wait for, which is how the paper counts. Compute saved is the share of full depth's "
    "multiply-accumulates that are not done, net of gates, projections and the keys and values of skipped "
    "blocks, which are propagated here; with backfill they are computed later, together, so "
    "that passes are saved and no compute."
)


def trade_off_section(content: ReportContent) -> Section | None:
    """The section; None where no mode lets tokens leave."""
    variant = trade_off_variant(content)
    if variant is None:
        return None
    held = trade_offs(content.table, variant)
    layers, net = (_curve(held, axis) for axis in ("layers", "net"))
    if layers is None or net is None:
        return None
    points = _points(content, variant)
    return Section(
        "trade-off",
        "What leaving early costs",
        f"{_opening(layers, net, points)} Each point is a threshold, on {count(content.table.tokens)} tokens; "
        "ringed ones are certified, for the risk beside them where there is room. Points of the paper that our curve "
        "reaches are compared with it as ours are with the paper's.",
        "The paper's curve is another model on other data: shapes are to be compared, in relative terms.",
        (
            _picture(variant, layers, net, _certified(points)),
            Details("Every point", (_table(points), _paper_table())),
            Details("How saving is counted", (Text(_COUNTED),)),
            Details("Held against the paper's curve", (_comparisons(held),)),
        ),
    )


def trade_off_variant(content: ReportContent) -> Variant | None:
    """The variant whose thresholds were swept, or the most compressed one with exits; None without any."""
    swept = content.table.sweep or content.table.results
    variants = [result.mode.variant for result in swept if result.mode.threshold is not None]
    if not variants:
        return None
    return max(
        variants, key=lambda each: (each.weights == "int4") + (each.kv_cache == "int4") - each.linear_block
    )


def _curve(held: Sequence[TradeOff], axis: str) -> TradeOff | None:
    """The curve of an axis over the same variant's full depth, propagated."""
    return next(
        (
            each
            for each in held
            if (each.curve.axis, each.curve.base, each.curve.skipped_kv) == (axis, "variant", "propagate")
            and each.curve.points
        ),
        None,
    )


def _points(content: ReportContent, variant: Variant) -> list[ModeResult]:
    """The modes behind the curves, least saved first."""
    own = [
        result
        for result in (*content.table.results, *content.table.sweep)
        if result.mode.variant == variant
        and result.mode.threshold is not None
        and result.mode.skipped_kv == "propagate"
    ]
    return sorted(
        {result.mode: result for result in own}.values(), key=lambda result: result.passes_saved.value
    )


def _certified(points: Sequence[ModeResult]) -> dict[float, str]:
    """The certified target of each threshold that has one, in short; of two that of disagreement."""
    return {
        result.mode.threshold: percent(result.mode.target)
        if result.mode.target is not None
        else f"{result.mode.nll_target:g}"
        for result in points
        if result.mode.certified and result.mode.threshold is not None
    }


def _opening(layers: TradeOff, net: TradeOff, points: Sequence[ModeResult]) -> str:
    parts = []
    certified = [each for each in points if each.mode.target is not None]
    if certified:
        best = max(certified, key=lambda each: each.passes_saved.value)
        increase = 0.0 if best.exits_ratio is None else best.exits_ratio.value - 1.0
        parts.append(
            f"Certified to differ on at most {percent(best.mode.target or 0.0)} of the tokens that leave, exits with "
            f"propagated keys and values skip {share(best.passes_saved.value)} of the layers for "
            f"{100 * increase:+.1f} % perplexity. {_net(best)}"
        )
    if by_layers := _below(layers, "by layers skipped, as the paper counts"):
        parts.append(f"{by_layers} {_below(net, 'net of what exits compute') or _NOTHING_NET}")
    return " ".join(parts) or "No threshold saves anything here."


_NOTHING_NET: Final = "Net of what exits compute no point can be compared."


def _below(held: TradeOff, counted: str) -> str:
    """Whether a curve lies below the paper's, in words; nothing where no point of it can be compared."""
    found = held.comparison
    if not found.compared:
        return ""
    if not any(point.saved.value > 0 for point in held.curve.points):
        return (
            f"Counted {counted}, no threshold saves anything, so that nothing lies below the paper's curve."
        )
    if not found.below:
        return (
            f"Counted {counted}, not all of the {found.compared} points that can be compared lie below the paper's "
            f"curve{_worst(held)}."
        )
    sure = ", also with the upper ends of their intervals" if found.surely else ""
    closest = "" if found.closest is None else f"; the closest pays {_paid(found.closest)}"
    return (
        f"Counted {counted}, all {found.compared} points that can be compared lie below the paper's curve{sure}"
        f"{closest}."
    )


def _worst(held: TradeOff) -> str:
    """Which points do not lie below: one that pays more than the paper's, or those that save nothing and cost."""
    closest = held.comparison.closest
    if closest is not None and closest >= 1.0:
        return f": the worst pays {_paid(closest)}"
    idle = sum(point.saved.value <= 0 < point.increase.value for point in held.curve.points)
    return f": {idle} of them save nothing and cost perplexity all the same" if idle else ""


def _paid(ratio: float) -> str:
    return f"{100 * ratio:.0f} % of what the paper's routing does"


def _net(result: ModeResult) -> str:
    """What is left of a mode's saving when its exits are paid for."""
    saved = result.compute_saved.value
    if saved > 0:
        return f"Net of what exits compute themselves, {share(saved)} of the compute is saved."
    return f"With what exits compute themselves it is {share(-saved)} more than full depth computes."


def _picture(variant: Variant, layers: TradeOff, net: TradeOff, certified: dict[float, str]) -> Figure:
    def paint(axes: Axes) -> None:
        theirs = [1.0, *(1 + increase / EXITS_PERPLEXITY for _, increase in EXITS_TRADE_OFF)]
        shares = [0.0, *(100 * saved for saved, _ in EXITS_TRADE_OFF)]
        axes.axhline(1.0, color=INK, linewidth=1)
        axes.plot(shares, theirs, **series(1).look, label="softmax routing, Mistral 7B (paper)")
        _line(axes, layers.curve, series(0), "this bundle, layers skipped")
        _line(axes, net.curve, series(2), "this bundle, compute saved, net")
        _marks(axes, layers.curve, certified)
        ratios = [ratio for each in (layers, net) for ratio in _ratios(each.curve)]
        highest = max(theirs[-1], *(each.ends[1] for each in ratios))
        _logarithmic(axes, highest, min(1.0, *(each.ends[0] for each in ratios)))
        axes.set(xlabel="saved, % of full depth", ylabel="perplexity, × exits off")
        axes.legend(loc="upper left")

    return draw(
        "trade-off",
        "Perplexity against layers and compute saved, beside the paper's curve",
        f"{variant_name(variant)}: perplexity, as a multiple of that with exits off, against what is saved with "
        "propagated keys and values, with 95 % intervals; the axis of perplexity is logarithmic. Lower and further "
        "right is better.",
        paint,
        height=3.7,
    )


def _ratios(curve: TradeCurve) -> list[Measure]:
    return [Measure(1 + p.increase.value, 1 + p.increase.low, 1 + p.increase.high) for p in curve.points]


def _line(axes: Axes, curve: TradeCurve, look: Series, name: str) -> None:
    ratios = _ratios(curve)
    axes.errorbar(
        [100 * point.saved.value for point in curve.points],
        [ratio.value for ratio in ratios],
        xerr=[[100 * end for end in ends] for ends in whiskers([point.saved for point in curve.points])],
        yerr=whiskers(ratios),
        **look.look,
        markersize=4,
        elinewidth=0.8,
        label=name,
    )


def _marks(axes: Axes, curve: TradeCurve, certified: dict[float, str]) -> None:
    """The certified points' risks, where there is room for them."""
    last = -1e9
    span = 100 * max(EXITS_TRADE_OFF[-1][0], *(point.saved.value for point in curve.points))
    for point, ratio in zip(curve.points, _ratios(curve), strict=True):
        target, at = certified.get(point.threshold), 100 * point.saved.value
        if target is None:
            continue
        axes.plot([at], [ratio.value], "o", ms=10, mfc="none", mew=1.4, color=INK)
        if at - last > 0.09 * span:
            axes.annotate(
                target,
                (at, ratio.value),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                fontsize=9.5,
            )
            last = at


def _logarithmic(axes: Axes, high: float, low: float) -> None:
    """A logarithmic y axis of multiples with round ticks, and room for a legend."""
    top, bottom = 1.35 * high**1.35, min(0.94, 0.98 * low)
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    ticks = [
        tick for tick in (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0) if bottom <= tick <= 1.15 * high
    ]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _table(points: Sequence[ModeResult]) -> Table:
    headers = (
        "threshold",
        "certified",
        "layers skipped",
        "compute saved",
        "leave early",
        "of them differ",
        "perplexity",
    )
    return Table(
        headers, [_row(each) for each in points], caption="This bundle; perplexity over that with exits off"
    )


def _row(result: ModeResult) -> list[Cell]:
    return [
        Cell("–" if result.mode.threshold is None else f"{result.mode.threshold:.4f}"),
        Cell(promised(result.mode) or "no"),
        measured_share(result.passes_saved),
        measured_share(result.compute_saved),
        measured_share(result.exit_rate),
        measured_share(result.disagreement),
        measured(result.exits_ratio, "{:.3f} ×"),
    ]


def _paper_table() -> Table:
    rows = [
        [share(saved), f"{EXITS_PERPLEXITY + increase:.2f}", f"{1 + increase / EXITS_PERPLEXITY:.3f} ×"]
        for saved, increase in EXITS_TRADE_OFF
    ]
    caption = f"Softmax routing on Mistral 7B, perplexity {EXITS_PERPLEXITY} (arXiv 2604.20682)"
    return Table(("layers skipped", "perplexity", "over full depth"), rows, words=0, caption=caption)


def _comparisons(held: Sequence[TradeOff]) -> Table:
    rows = []
    for each in held:
        curve, found = each.curve, each.comparison
        below = "not compared" if not found.compared else "yes" if found.below else "no"
        rows.append(
            [
                Cell(
                    f"{'layers skipped' if curve.axis == 'layers' else 'compute, net'}",
                    skipped_name(curve.skipped_kv),
                ),
                Cell("same savings, exits off" if curve.base == "variant" else "nothing saved"),
                Cell(below, "with intervals" if found.surely else "", "good" if found.below else "fair"),
                Cell(f"{found.compared}"),
                Cell("–" if found.closest is None else f"{100 * found.closest:.0f} %"),
            ]
        )
    return Table(("saved", "perplexity over", "below", "points", "closest, of the paper's"), rows, words=3)
