"""What `exeunt eval` prints and writes: every mode, how the price of exits compares, and what modes wrote."""

import json
import math
from dataclasses import replace
from io import StringIO
from typing import Any

from rich.console import Console

from exeunt.calibration.evaluation import EvaluationTable, Measure, Mode, ModeResult
from exeunt.calibration.generation import Written
from exeunt.calibration.trade_off import trade_offs
from exeunt.compression.variant import SkippedKV, Variant
from exeunt.deploy.evaluation import Evaluated, show_evaluation
from exeunt.deploy.measured_model import MeasuredModel

SMALL = Variant("int4", "int4", False)
OFF, FULL = Mode(SMALL), Mode(Variant())


def exact(value: float) -> Measure:
    return Measure(value, value, value)


def result(mode: Mode, cost: float = 0.0, layers: float = 0.0, net: float = 0.0) -> ModeResult:
    return ModeResult(
        mode=mode,
        perplexity=exact(20 * (1 + cost)),
        perplexity_increase=exact(20 * cost),
        perplexity_ratio=exact(1 + cost),
        exits_ratio=None if mode.threshold is None else exact(1 + cost),
        kl=exact(cost),
        agreement=exact(1 - cost),
        mean_depth=exact(8 * (1 - layers)),
        exit_rate=exact(2 * layers),
        disagreement=None if mode.threshold is None else exact(cost),
        passes_saved=exact(layers),
        compute_saved=exact(net),
        by_exit=(7,),
        tokens=100,
    )


def written(mode: Mode, temperature: float) -> Written:
    return Written(
        mode, temperature, exact(12.5), exact(7.0), exact(0.25), 0.125, 0.75, "Once", " upon a time"
    )


def at(threshold: float, skipped_kv: SkippedKV) -> Mode:
    return Mode(SMALL, threshold, None, skipped_kv)


def evaluated() -> Evaluated:
    results = (
        result(FULL),
        result(OFF),
        result(at(0.9, "propagate"), 0.02, 0.07, 0.05),
        result(at(0.9, "backfill"), 0.02, 0.07, -0.02),
    )
    sweep = (result(at(0.4, "propagate"), 0.9, 0.1, 0.08),)
    table = EvaluationTable("text.txt", 100, 4, 8, results, sweep)
    wrote = tuple(written(mode, temperature) for temperature in (0.0, 1.0) for mode in (FULL, OFF))
    about = MeasuredModel("m", None, 1, 8, ("block_1",), None)
    return Evaluated(about, table, {}, trade_offs(table, SMALL), wrote)


def printed() -> str:
    shown = StringIO()
    console = Console(file=shown, width=200)
    show_evaluation(evaluated(), console.print)
    return " ".join(shown.getvalue().split())


def test_compute_saved_stands_beside_the_quality() -> None:
    text = printed()
    assert "compute saved" in text
    assert "5.0% [5.0%, 5.0%]" in text
    assert "-2.0% [-2.0%, -2.0%]" in text


def test_how_the_price_compares_with_the_papers_is_said_of_each_way() -> None:
    text = printed()
    assert (
        "Exits of int4/int4, backfill, by share of layers not waited for: below the paper's curve at every point (2 "
        "compared, 1 of the paper's 4 reached)." in text
    )
    assert "propagate, by share of layers not waited for: not below the paper's curve everywhere" in text
    assert (
        "propagate, by share of compute saved, net of gates: not below the paper's curve everywhere" in text
    )
    assert (
        "The paper is “Variance Is Not Importance”, arXiv 2604.20682. Its curve is another model (Mistral 7B) on other "
        "data" in text
    )


def test_what_modes_wrote_is_a_line_each() -> None:
    text = printed()
    assert text.count("12.50 [12.50, 12.50]") == 4
    for header in ("perplexity greedy", "perplexity sampled", "repeated greedy", "exit rate sampled"):
        assert all(word in text for word in header.split())


def test_the_record_has_everything_and_no_number_that_json_has_not() -> None:
    record: dict[str, Any] = json.loads(json.dumps(evaluated().record("m"), allow_nan=False))
    assert [mode["name"] for mode in record["modes"]][:2] == ["full/full", "int4/int4"]
    assert record["modes"][2]["passes_saved"] == {"value": 0.07, "low": 0.07, "high": 0.07}
    assert record["sweep"][0]["mode"]["threshold"] == 0.4
    curves = {
        (each["curve"]["skipped_kv"], each["curve"]["axis"], each["curve"]["base"]): each["comparison"]
        for each in record["trade_off"]["curves"]
    }
    assert curves["backfill", "layers", "variant"]["below"]
    assert not curves["propagate", "net", "variant"]["below"]
    assert record["trade_off"]["paper"][-1]["saved"] == 0.269
    assert [(each["name"], each["temperature"]) for each in record["written"]] == [
        ("full/full", 0.0),
        ("int4/int4", 0.0),
        ("full/full", 1.0),
        ("int4/int4", 1.0),
    ]
    assert record["written"][0]["sample"] == " upon a time"


def test_a_certified_target_of_the_likelihood_stands_beside_the_others() -> None:
    found = evaluated()
    mode = Mode(SMALL, 0.85, None, "backfill", 0.02)
    table = replace(found.table, results=(*found.table.results, result(mode, 0.01, 0.1, -0.02)))
    shown = StringIO()
    show_evaluation(replace(found, table=table), Console(file=shown, width=250).print)
    assert "int4/int4 exits 0.02 nats certified" in " ".join(shown.getvalue().split())
    record = replace(found, table=table).record("m")["modes"][-1]
    assert (record["mode"]["nll_target"], record["mode"]["target"]) == (0.02, None)


def test_what_one_block_of_text_leaves_open_is_no_number() -> None:
    lone = replace(result(OFF), perplexity=Measure(20.0, math.nan, math.nan))
    table = EvaluationTable("t", 100, 1, 8, (result(FULL), lone))
    found = replace(evaluated(), table=table, written=())
    record = json.loads(json.dumps(found.record("m"), allow_nan=False))
    assert record["modes"][1]["perplexity"] == {"value": 20.0, "low": None, "high": None}
    lone = replace(lone, perplexity_increase=Measure(1.0, math.nan, math.nan))
    assert "+1.00 [–]" in replace(table, results=(result(FULL), lone)).rows()[1]


def test_without_exits_and_without_writing_there_is_the_table_alone() -> None:
    found = evaluated()
    plain = Evaluated(found.model, EvaluationTable("t", 100, 4, 8, (result(FULL),)), {})
    shown: list[Any] = []
    show_evaluation(plain, shown.append)
    assert len(shown) == 1
