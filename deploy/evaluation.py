"""`exeunt eval`: every mode's quality on a text, and beside it what the mode is for: its speed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from rich.text import Text

from exeunt.calibration.evaluate import EvaluationOptions, evaluate
from exeunt.calibration.evaluation import EvaluationTable, Mode, ModeResult
from exeunt.calibration.evaluation_table import with_interval
from exeunt.calibration.generation import Written
from exeunt.calibration.json_values import json_values
from exeunt.calibration.papers import EXITS_SOURCE
from exeunt.calibration.progress import watched_progress
from exeunt.calibration.trade_off import TradeOff, paper_curve
from exeunt.compression.model import LoadedModel
from exeunt.deploy.bench import BenchMode, bench_record
from exeunt.deploy.bench_engine import engine_driver
from exeunt.deploy.bench_load import Load
from exeunt.deploy.bench_table import measure
from exeunt.deploy.figure_table import FigureColumn, FigureTable
from exeunt.deploy.measured_model import MeasuredModel, measured_model

_SPEED: Final = "tokens/s"
_WORTH: Final = {
    name: worth
    for worth, name in enumerate(
        (
            *("KL", "exits that differ", "mean depth", "compute saved", "exit rate", "agreement"),
            *(_SPEED, "change", "perplexity"),
        )
    )
}
"""Which columns are kept where not all have room: those named later here."""

LOAD = Load(concurrency=8, prompt_tokens=32, max_new_tokens=64, requests=16)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A model's table of modes, where measured each mode's tokens per second by name, and where asked what it wrote."""

    model: MeasuredModel
    table: EvaluationTable
    speed: Mapping[str, float]
    trade_off: Sequence[TradeOff] = ()
    written: Sequence[Written] = ()

    def record(self, target: str) -> dict[str, Any]:
        """The table as JSON; `target` is what was asked for."""
        rows = [
            _record(result) | {"tokens_per_second": self.speed.get(result.mode.name)}
            for result in self.table.results
        ]
        about = {key: value for key, value in asdict(self.table).items() if key not in ("results", "sweep")}
        found = (
            bench_record(target, self.model, LOAD, ())
            | about
            | {
                "modes": rows,
                "sweep": [_record(result) for result in self.table.sweep],
                "trade_off": {
                    "paper": [{"saved": saved, "increase": increase} for saved, increase in paper_curve()],
                    "curves": [asdict(each) for each in self.trade_off],
                },
                "written": [asdict(each) | {"name": each.mode.name} for each in self.written],
            }
        )
        record: dict[str, Any] = json_values(found)
        return record


def _record(result: ModeResult) -> dict[str, Any]:
    return asdict(result) | result.record().model_dump(include={"name", "early_exit"})


def evaluate_and_time(model: LoadedModel, data: str, options: EvaluationOptions, *, speed: bool) -> Evaluated:
    """Every mode's quality on `data`, and its speed at eight requests at once.

    Raises CorpusError, CalibrationError or BenchError.
    """
    found = evaluate(model, data, options, watched_progress())
    speeds = _speeds(model, [result.mode for result in found.table.results]) if speed else {}
    return Evaluated(measured_model(model), found.table, speeds, found.trade_off, found.written)


def _speeds(model: LoadedModel, modes: Sequence[Mode]) -> dict[str, float]:
    load = _fitting(LOAD, model.spec.max_position_embeddings)
    driver = engine_driver(model, load)
    try:
        measured = measure(driver, [BenchMode(mode.name, _compression(mode)) for mode in modes], load)
    finally:
        driver.close()
    return {speed.name: speed.tokens_per_second for speed in measured}


def _fitting(load: Load, longest: int) -> Load:
    """`load` with prompts and answers that together are no longer than a model's limit."""
    prompt = max(1, min(load.prompt_tokens, longest // 3))
    return replace(load, prompt_tokens=prompt, max_new_tokens=min(load.max_new_tokens, longest - prompt))


def _compression(mode: Mode) -> dict[str, Any]:
    exits: Any = False
    if mode.threshold is not None:
        exits = {"mode": "approximate", "threshold": mode.threshold, "skipped_kv": mode.skipped_kv}
    return {**asdict(mode.variant), "early_exit": exits}


def evaluation_table(evaluated: Evaluated) -> FigureTable:
    """One line a mode, with 95 % intervals in brackets where there is room."""
    table = evaluated.table
    columns = [
        FigureColumn(
            column.header,
            column.cells,
            _WORTH[column.header],
            column.values if column.values != column.cells else None,
            "intervals",
        )
        for column in table.columns()
    ]
    if evaluated.speed:
        speeds = tuple(f"{evaluated.speed[name]:.0f}" for name in table.names)
        columns.append(FigureColumn(_SPEED, speeds, _WORTH[_SPEED]))
    title = f"{table.tokens:,} tokens of {table.text}"
    return FigureTable(table.names, tuple(columns), title, "95 % intervals in brackets")


def show_evaluation(evaluated: Evaluated, show: Callable[[Any], None]) -> None:
    """Give `show` the table of modes, how the price of exits compares, and what modes wrote."""
    show(evaluation_table(evaluated))
    for line in trade_off_lines(evaluated):
        show(Text(line, style="dim"))
    if evaluated.written:
        show(written_table(evaluated))


_PAPER: Final = (
    f"The paper is {EXITS_SOURCE}. Its curve is another model (Mistral 7B) on other data: shapes are to be compared, "
    "in relative terms."
)


def trade_off_lines(evaluated: Evaluated) -> list[str]:
    """What is to be said of the price of exits, held against the paper's curve; nothing without exits."""
    found = [_finding(each) for each in evaluated.trade_off if each.curve.base == "variant"]
    return [*found, _PAPER] if found else []


def _finding(found: TradeOff) -> str:
    curve, held = found.curve, found.comparison
    saved = "of layers not waited for" if curve.axis == "layers" else "of compute saved, net of gates"
    where = f"Exits of {curve.variant.short_name}, {curve.skipped_kv}, by share {saved}"
    if held.compared == 0:
        return f"{where}: no threshold that can be compared with the paper's curve."
    verdict = (
        "below the paper's curve at every point" if held.below else "not below the paper's curve everywhere"
    )
    return f"{where}: {verdict} ({held.compared} compared, {held.reached} of the paper's 4 reached)."


def written_table(evaluated: Evaluated) -> FigureTable:
    """One line a mode: what it wrote at each temperature, as the full model sees it."""
    written = {(each.mode, each.temperature): each for each in evaluated.written}
    modes = tuple(dict.fromkeys(mode for mode, _ in written))
    temperatures = sorted({temperature for _, temperature in written})
    columns = [
        column
        for worth, temperature in enumerate(temperatures)
        for column in _written_columns([written[mode, temperature] for mode in modes], worth)
    ]
    title = "What modes write, read by the full model"
    return FigureTable(
        tuple(mode.name for mode in modes), tuple(columns), title, "95 % intervals in brackets"
    )


def _written_columns(written: Sequence[Written], worth: int) -> Iterator[FigureColumn]:
    """The columns of one temperature; of several those with a higher `worth` are kept first."""
    how = "greedy" if written[0].temperature == 0 else "sampled"
    perplexities = [each.perplexity for each in written]
    brief = tuple(f"{each.value:.2f}" for each in perplexities)
    whole = tuple(with_interval(each, "{:.2f}") for each in perplexities)
    yield FigureColumn(f"perplexity {how}", whole, 8 + worth, brief, "intervals")
    yield FigureColumn(f"repeated {how}", tuple(f"{each.repeated:.1%}" for each in written), 6 + worth)
    yield FigureColumn(
        f"exit rate {how}", tuple(f"{each.exit_rate.value:.1%}" for each in written), 4 + worth
    )
    yield FigureColumn(f"distinct pairs {how}", tuple(f"{each.distinct:.1%}" for each in written), worth)
