"""The tables of `exeunt eval` and `exeunt bench` at the widths of real terminals: every figure shown is whole."""

from collections.abc import Iterator
from typing import Literal

import pytest
from rich.console import Console

from exeunt.calibration.evaluation import EvaluationTable, Measure, Mode, ModeResult
from exeunt.compression.variant import Variant
from exeunt.deploy.bench import ModeSpeed
from exeunt.deploy.bench_table import speed_table
from exeunt.deploy.evaluation import Evaluated, evaluation_table
from exeunt.deploy.figure_table import FigureTable, Form
from exeunt.deploy.measured_model import MeasuredModel

BLOCKS = 32
KEPT_AT_80 = {
    "eval": {"perplexity", "change", "agreement", "exit rate", "tokens/s"},
    "bench": {"tok/s", "against", "first ms", "next ms", "exits", "depth"},
}


def measure(value: float) -> Measure:
    return Measure(value, value * 0.9, value * 1.1)


def result(number: int, mode: Mode) -> ModeResult:
    return ModeResult(
        mode=mode,
        perplexity=measure(1203.4 + number),
        perplexity_increase=measure(12.34 + number),
        perplexity_ratio=measure(1.0123 + number),
        exits_ratio=None if mode.threshold is None else measure(1.0045),
        kl=measure(0.1234 + number / 100),
        agreement=measure(0.8765 - number / 100),
        mean_depth=measure(30.12 + number / 10),
        exit_rate=measure(0.2345 + number / 100),
        disagreement=None if mode.threshold is None else measure(0.0567 + number / 100),
        passes_saved=measure(0.0612),
        compute_saved=measure(-0.0321 + number / 100),
        by_exit=(1,),
        tokens=16_000,
    )


def evaluation() -> FigureTable:
    modes = [
        Mode(Variant("full", "full", False)),
        Mode(Variant("int4", "int4", True), 0.52, None, "backfill"),
    ]
    modes.append(Mode(Variant("int4", "int4", False), 0.8123, 0.015))
    results = tuple(result(number, mode) for number, mode in enumerate(modes))
    table = EvaluationTable("[a] text.txt", 16_000, 40, BLOCKS, results)
    about = MeasuredModel("m", None, 1, BLOCKS, ("block_1",), None)
    return evaluation_table(Evaluated(about, table, {each.mode.name: 12345.0 for each in results}))


def speeds() -> FigureTable:
    quantiles = {"p50": 0.1234, "p90": 0.5, "p99": 1.2345}
    ratios: tuple[tuple[str, float | Literal["uninformative"]], ...] = (
        ("int4/int4 linear exits 10% propagate", 1.07),
        ("verified", "uninformative"),
    )
    shown = [
        ModeSpeed(
            name=name,
            compression={},
            against="int4/int4 linear",
            ratio=ratio,
            tokens=2048,
            seconds=1.0,
            tokens_per_second=12345.0,
            time_to_first_token_s=quantiles,
            inter_token_latency_s=quantiles,
            exit_rate=0.2345,
            mean_depth=30.12,
            blocks=BLOCKS,
            passes_saved=0.1234,
            drafts=1234,
            drafts_accepted=1033,
        )
        for name, ratio in ratios
    ]
    return speed_table(shown)


TABLES = {"eval": evaluation, "bench": speeds}


def printed(table: FigureTable, width: int) -> list[str]:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


def words(table: FigureTable, forms: list[Form]) -> Iterator[str]:
    """Every figure of the columns kept."""
    for column, form in zip(table.columns, forms, strict=True):
        yield from (cell for cell in (column.shown(form) if form != "out" else ()) if cell)


@pytest.mark.parametrize("width", [30, 60, 80, 100, 140, 240])
@pytest.mark.parametrize("kind", TABLES)
def test_no_figure_is_cut_short(kind: str, width: int) -> None:
    table = TABLES[kind]()
    lines, forms = printed(table, width), table.forms(width)
    text = "\n".join(lines)
    assert all(len(line) <= width for line in lines)
    assert "…" not in text
    figures = list(words(table, forms))
    assert figures
    for figure in figures:
        assert text.count(figure) >= figures.count(figure), figure
    left_out = [column for column, form in zip(table.columns, forms, strict=True) if form == "out"]
    tail = " ".join(" ".join(lines[-6:]).split())
    for column in left_out:
        assert column.header in tail.partition("Not shown")[2], "what is left out is named"
    squeezed = " ".join(text.split())
    for name in table.names:
        assert name.split()[0] in squeezed
    if width >= 80:
        shown = {column.header for column in table.columns} - {column.header for column in left_out}
        assert shown >= KEPT_AT_80[kind]


@pytest.mark.parametrize("kind", TABLES)
def test_where_there_is_room_everything_is_shown(kind: str) -> None:
    table = TABLES[kind]()
    assert set(table.forms(240)) == {"whole"}
    text = "\n".join(printed(table, 240))
    assert "Not shown" not in text
    assert all(name in text for name in table.names)
    assert ("95 % intervals in brackets" in text) == (kind == "eval")


def test_intervals_give_way_before_columns() -> None:
    table = evaluation()
    seen = [table.forms(width) for width in range(20, 260)]
    for forms in seen:
        if "out" in forms:
            briefable = [column.brief is not None for column in table.columns]
            assert all(form != "whole" for form, may in zip(forms, briefable, strict=True) if may)
    left = [forms.count("out") for forms in seen]
    assert left == sorted(left, reverse=True)
    assert left[0] == len(table.columns) - 1
    assert "95 % intervals" not in "\n".join(printed(table, 60))


def test_a_files_name_is_no_markup() -> None:
    assert "[a] text.txt" in "\n".join(printed(evaluation(), 140))
