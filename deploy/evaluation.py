"""`exeunt eval`: every mode's quality on a text, and beside it what the mode is for: its speed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from exeunt.calibration.evaluate import EvaluationOptions, evaluate
from exeunt.calibration.evaluation import EvaluationTable, Mode
from exeunt.calibration.progress import watched_progress
from exeunt.compression.model import LoadedModel
from exeunt.deploy.bench import BenchMode, Load, bench_record
from exeunt.deploy.bench_engine import engine_driver
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
    """A model's table of modes and, where it was measured, each mode's tokens per second by name."""

    model: MeasuredModel
    table: EvaluationTable
    speed: Mapping[str, float]

    def record(self, target: str) -> dict[str, Any]:
        """The table as JSON; `target` is what was asked for."""
        rows = []
        for result in self.table.results:
            row = asdict(result) | result.record().model_dump(include={"name", "early_exit"})
            rows.append(row | {"tokens_per_second": self.speed.get(result.mode.name)})
        about = {key: value for key, value in asdict(self.table).items() if key != "results"}
        return bench_record(target, self.model, LOAD, ()) | about | {"modes": rows}


def evaluate_and_time(model: LoadedModel, data: str, *, tokens: int, speed: bool, seed: int = 0) -> Evaluated:
    """Every mode's quality on `data`, and its speed at eight requests at once. Raises CorpusError, BenchError."""
    table = evaluate(model, data, EvaluationOptions(tokens=tokens, seed=seed), watched_progress())
    speeds = _speeds(model, [result.mode for result in table.results]) if speed else {}
    return Evaluated(measured_model(model), table, speeds)


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
