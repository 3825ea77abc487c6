"""The report's pictures as inline SVG that reads on light and dark pages: no background, text in the page's colour."""

import io
from collections.abc import Callable
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from exeunt.calibration.block_choice import BlockChoice
from exeunt.calibration.report.content import ReportContent

_INK: Final = "#123456"  # stands for the page's text colour until the SVG is written
COLOURS: Final = ("#4c8dd6", "#e08a3c", "#3fa577", "#c9577c", "#8f6fd1", "#9a8a3f", "#4fb0b8", "#888888")
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "exeunt",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "grid.color": _INK,
}


def _drawn(draw: Callable[[Axes], None], label: str, width: float = 6.4, height: float = 3.4) -> str:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def linearity_plot(choice: BlockChoice) -> str:
    """R² of a linear map for every block, at full rank and within the size budget."""

    def draw(axes: Axes) -> None:
        blocks = [fit.block for fit in choice.fits]
        axes.plot(blocks, [fit.r2 for fit in choice.fits], "o-", color=COLOURS[0], label="full rank")
        rank = choice.fits[0].map.rank
        axes.plot(blocks, [fit.r2_cut for fit in choice.fits], "s--", color=COLOURS[1], label=f"rank {rank}")
        if choice.chosen is not None:
            axes.axvline(choice.chosen.block, color=COLOURS[2], alpha=0.6, label="chosen")
        axes.set(xlabel="block", ylabel="R² on the select split", xticks=blocks)
        axes.legend()

    return _drawn(draw, "R squared of a linear map for each block")


def agreement_plot(content: ReportContent) -> str:
    """Agreement with full depth at each exit, before and after training."""

    def draw(axes: Axes) -> None:
        places = range(len(content.exits))
        series = (
            ("model's own head", [each.training.untrained_agreement for each in content.exits]),
            ("ridge adapter", [each.training.ridge_agreement for each in content.exits]),
            ("trained head", [each.training.agreement for each in content.exits]),
        )
        for number, (name, values) in enumerate(series):
            axes.bar(
                [p + 0.27 * (number - 1) for p in places], values, 0.25, color=COLOURS[number], label=name
            )
        axes.set_xticks(list(places), [each.head.name for each in content.exits])
        axes.set(ylabel="agreement with full depth", ylim=(0, 1))
        axes.legend(loc="upper left")

    return _drawn(draw, "Agreement with full depth at each exit")


def reliability_plot(content: ReportContent) -> str:
    """What the gates say against what happens, on the select split."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=_INK, alpha=0.4, linewidth=1)
        for number, each in enumerate(content.exits):
            said, was, _ = zip(*each.gate.reliability, strict=True)
            axes.plot(
                said, was, "o-", color=COLOURS[number % len(COLOURS)], label=each.head.name, markersize=4
            )
        axes.set(
            xlabel="gate's probability of agreement", ylabel="share that agrees", xlim=(0, 1), ylim=(0, 1)
        )
        axes.legend()

    return _drawn(draw, "Reliability of the gates", width=4.2, height=3.8)


def risk_plot(content: ReportContent) -> str:
    """Disagreement among tokens that leave, against how many leave, for every combination tested.

    A variant has one colour; its line is solid where skipped keys and values are propagated, dotted with backfill.
    """

    def draw(axes: Axes) -> None:
        variants = list(dict.fromkeys(each.variant for each in content.certified))
        for each in content.certified:
            propagated = each.skipped_kv == "propagate"
            seen = [(c.total / c.tokens, c.risk) for _, c in each.certification.tested if c.risk is not None]
            if seen:
                rates, risks = zip(*seen, strict=True)
                axes.plot(
                    rates,
                    risks,
                    "o-" if propagated else ".:",
                    color=COLOURS[variants.index(each.variant) % len(COLOURS)],
                    label=str(each.variant) if propagated else None,
                    markersize=4,
                )
        for target in content.selection.plan.begins:
            axes.axhline(target, color=_INK, alpha=0.3, linewidth=1, linestyle=":")
        axes.set(xlabel="share of tokens that leave early", ylabel="disagreement among them")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)

    return _drawn(draw, "Disagreement against exit rate", height=3.8)


def trade_plot(content: ReportContent) -> str:
    """Perplexity against mean depth for every mode, lines as in `risk_plot`."""

    def draw(axes: Axes) -> None:
        variants = list(dict.fromkeys(result.mode.variant for result in content.table.results))
        for number, variant in enumerate(variants):
            for skipped_kv in ("propagate", "backfill"):
                own = [
                    result
                    for result in content.table.results
                    if result.mode.variant == variant
                    and (result.mode.threshold is None or result.mode.skipped_kv == skipped_kv)
                ]
                own.sort(key=lambda result: result.mean_depth.value)
                axes.plot(
                    [result.mean_depth.value for result in own],
                    [result.perplexity.value for result in own],
                    "o-" if skipped_kv == "propagate" else ".:",
                    color=COLOURS[number % len(COLOURS)],
                    label=str(variant) if skipped_kv == "propagate" else None,
                    markersize=4,
                )
        axes.set(xlabel=f"mean depth in blocks, of {content.table.blocks}", ylabel="perplexity")
        axes.legend(fontsize=7)

    return _drawn(draw, "Perplexity against mean depth", height=3.8)
