"""Every mode: what each combination of savings costs on text that nothing was fitted on."""

from matplotlib.axes import Axes

from exeunt.calibration.evaluation import EvaluationTable, ModeResult
from exeunt.calibration.report.charts import Line, forest, forest_height
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.drawing import draw
from exeunt.calibration.report.parts import Cell, Details, Figure, Section, Table
from exeunt.calibration.report.verdict import relative_to
from exeunt.calibration.report.words import (
    count,
    measured,
    measured_share,
    promised,
    skipped_name,
    variant_name,
)


def modes_section(content: ReportContent) -> Section:
    """The section; every calibration has one."""
    table = content.table
    off = [result for result in table.results if result.mode.threshold is None]
    exits = [result for result in table.results if result.mode.threshold is not None]
    parts: list[Figure | Table | Details] = [
        *([_costs(table, off)] if len(off) > 1 else []),
        _table(table, off),
    ]
    if exits:
        parts.append(
            Details(f"With tokens that leave early: {len(exits)} more modes", (_table(table, exits),))
        )
    return Section(
        "modes",
        "Every mode",
        f"Each combination of savings, teacher-forced on {count(table.tokens)} tokens ({table.text}) in "
        f"{table.text_blocks} blocks of text. The change is in perplexity over the first row, KL in nats per "
        "token from its distribution, agreement of top tokens with it. Small print is 95 % intervals, from "
        "bootstraps over blocks of text, the same for all modes: their differences are sharper than the "
        "intervals suggest.",
        "Thresholds were certified on the same split, so that figures with exits lean a little to the good side. The "
        "verified mode has no row: its output is that of exits off.",
        tuple(parts),
    )


def _costs(table: EvaluationTable, off: list[ModeResult]) -> Figure:
    compressed = off[1:]
    base = table.results[0].perplexity.value

    def paint(axes: Axes) -> None:
        forest(axes, [_line(result, base) for result in compressed], form="{:+.1f} %")
        axes.set_xlabel("change of perplexity, %")

    return draw(
        "modes",
        "Increase of perplexity of each combination of savings with its 95 % interval",
        f"Increase of perplexity over the full model's {base:.2f}, exits off, with 95 % intervals. Left of the "
        "line a mode would be better than the full model.",
        paint,
        height=forest_height(len(compressed)),
    )


def _line(result: ModeResult, base: float) -> Line:
    variant = result.mode.variant
    change = relative_to(result.perplexity_increase, base / 100)
    return Line(variant_name(variant), change, int(variant.linear_block))


def _table(table: EvaluationTable, results: list[ModeResult]) -> Table:
    exits = any(result.mode.threshold is not None for result in results)
    headers = ("mode", "perplexity", "change", "KL", "agreement", "mean depth")
    return Table(
        (*headers, "leave early", "of them differ") if exits else headers,
        [_row(table, result, exits) for result in results],
    )


def _row(table: EvaluationTable, result: ModeResult, exits: bool) -> list[Cell]:
    row = [
        Cell(variant_name(result.mode.variant), _exits(result)),
        measured(result.perplexity),
        measured(result.perplexity_increase, "{:+.2f}"),
        measured(result.kl, "{:.4f}"),
        measured_share(result.agreement),
        Cell(f"{result.mean_depth.value:.2f} of {table.blocks}"),
    ]
    return [*row, measured_share(result.exit_rate), measured_share(result.disagreement)] if exits else row


def _exits(result: ModeResult) -> str:
    """What small print says of a mode's exits."""
    mode = result.mode
    if mode.threshold is None:
        return ""
    exits = f"threshold {mode.threshold:.2f}, not certified"
    if mode.certified:
        exits = f"{promised(mode)}, certified"
    return f"{exits}, {skipped_name(mode.skipped_kv)}"
