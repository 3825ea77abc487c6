"""The report's tables show what `report.json` holds."""

import json
import math
from dataclasses import replace

import pytest

from exeunt.calibration.bootstrap import Measure
from exeunt.calibration.evaluation_table import ModeResult
from exeunt.calibration.kv_forms import PER_CHANNEL
from exeunt.calibration.report.content import ReportContent, TextSource
from exeunt.calibration.report.json_report import report_json
from exeunt.calibration.report.parts import Text
from exeunt.calibration.report.sections.gates import within
from tests.calibration.report_content import (
    content,
    fitted_exit,
)
from tests.calibration.report_page import column, flat, sections, table


@pytest.fixture(scope="module")
def full() -> ReportContent:
    return content()


def test_the_modes_are_those_of_the_record(full: ReportContent) -> None:
    modes = json.loads(report_json(full))["evaluation"]["modes"]
    shown = table(full, "modes", "perplexity")
    off = [mode for mode in modes if mode["threshold"] is None]
    assert [cell.text for cell in column(shown, "perplexity")] == [
        f"{m['perplexity']['value']:.2f}" for m in off
    ]
    assert [cell.interval for cell in column(shown, "change")] == [
        f"{m['perplexity_increase']['low']:+.2f} to {m['perplexity_increase']['high']:+.2f}" for m in off
    ]
    exits = table(full, "modes", "leave early")
    left = [mode for mode in modes if mode["threshold"] is not None]
    assert [cell.text for cell in column(exits, "leave early")] == [
        f"{100 * m['exit_rate']['value']:.1f} %" for m in left
    ]


def test_it_is_shown_how_far_tokens_get_in_the_gates(full: ReportContent) -> None:
    record = json.loads(report_json(full))
    shown = table(full, "gates", "past the probe")
    for header, key in (("past the probe", "looked"), ("all logits asked", "whole"), ("leave", "left")):
        assert [cell.text for cell in column(shown, header)] == [
            f"{100 * each[key]:.1f} %" for each in record["thresholds"]["gates"]
        ]
    looks = [cell.text for cell in column(table(full, "gates", "AUC"), "looks at")]
    assert looks[0] == "the whole vocabulary"
    assert (
        looks[1] == "a shortlist of 86 tokens (AUC 0.777); of who reaches 0.9 × the threshold there, at all"
    )
    assert [each["list_ratio"] for each in record["exits"]] == [None, 0.9]
    assert record["costs"]["in_units_of_a_block"]["whole"] == 1.25
    assert record["exits"][1]["shortlist_tokens"] == 86
    assert len(record["exits"][1]["confirm_combine"]) == 4


def test_the_certificates_are_those_of_the_record(full: ReportContent) -> None:
    record = json.loads(report_json(full))["certificates"]
    shown = table(full, "certificates", "upper bound")
    targets = record[0]["targets"]
    assert record[0]["targets"] == record[1]["targets"]
    assert [cell.text for cell in column(shown, "upper bound")] == [
        f"{100 * target['upper_bound']:.2f} %" for target in targets
    ]
    assert [cell.text for cell in column(shown, "outcome")] == [
        "not certified: only 3 tokens left",
        "certified",
    ]


def test_the_exits_are_those_of_the_record(full: ReportContent) -> None:
    record = json.loads(report_json(full))
    by_name = {each["name"]: each for each in (*record["exits"], *record["exits_left_out"])}
    shown = table(full, "exits", "trained")
    names = [cell.text for cell in column(shown, "exit")]
    assert sorted(names) == sorted(by_name) == ["block_0", "block_1", "block_2"]
    for name, use, agreement in zip(names, column(shown, "kept for"), column(shown, "trained"), strict=True):
        assert agreement.text == f"{100 * by_name[name]['agreement_trained']:.1f} %"
        assert use.text == by_name[name].get("use", "left out")


def test_the_linear_block_is_that_of_the_record(full: ReportContent) -> None:
    record = json.loads(report_json(full))["linear_block"]
    shown = table(full, "linear-block", "change")
    wanted = [*record["candidates"], record["together"]]
    assert [cell.text for cell in column(shown, "change")] == [
        f"{each['increase']['value']:+.2f}" for each in wanted
    ]
    chosen = [row[0].text for row in shown.cells() if row[0].interval == "chosen"]
    assert chosen == [f"block {record['chosen']}"]


def test_a_gate_is_shown_with_its_own_figures(full: ReportContent) -> None:
    shown = table(full, "gates", "AUC")
    assert [cell.text for cell in column(shown, "AUC")] == [f"{each.gate.auc:.3f}" for each in full.exits]
    assert fitted_exit(2, 0.5).gate.auc == pytest.approx(0.82)


def test_the_trade_off_is_that_of_the_record(full: ReportContent) -> None:
    record = json.loads(report_json(full))["evaluation"]
    points = [
        mode
        for mode in (*record["modes"], *record["sweep"])
        if mode["exits_ratio"] is not None and mode["skipped_kv"] == "propagate"
    ]
    points.sort(key=lambda mode: mode["passes_saved"]["value"])
    assert len(points) == 4
    shown = table(full, "trade-off", "layers skipped")
    assert [cell.text for cell in column(shown, "compute saved")] == [
        f"{100 * mode['compute_saved']['value']:.1f} %" for mode in points
    ]
    assert [cell.text for cell in column(shown, "perplexity")] == [
        f"{mode['exits_ratio']['value']:.3f} ×" for mode in points
    ]
    assert [cell.text for cell in column(shown, "certified")] == [
        "no",
        "at most 5% differ",
        "no",
        "no",
    ]


def test_the_forms_of_the_cache_are_those_of_the_record(full: ReportContent) -> None:
    record = json.loads(report_json(full))["kv_study"]["subjects"]
    shown = table(full, "kv", "error of keys")
    int4 = next(each for each in record if each["weights"] == "int4")
    assert [cell.text for cell in column(shown, "change")[1:]] == [
        f"{cost['increase']['value']:+.3f}" for cost in int4["costs"]
    ]
    kept_out = [row[0].interval for row in shown.cells() if row[0].text == PER_CHANNEL.name]
    assert kept_out == ["cannot be served"]


def test_the_other_risk_is_that_of_the_record(full: ReportContent) -> None:
    record = json.loads(report_json(full))["certificates"][0]["nll"]
    shown = table(full, "certificates", "less likely")
    assert [cell.text for cell in column(shown, "upper bound")][:2] == ["+0.0130", "+0.0470"]
    assert [target["upper_bound"] for target in record["targets"]] == [0.013, 0.047]
    assert [cell.text for cell in column(shown, "outcome")][:2] == [
        "not certified: only 3 tokens left",
        "certified",
    ]
    ratio = record["targets"][1]["perplexity_ratio"]
    assert column(shown, "perplexity, unclipped")[1].text == f"{ratio['value']:.3f} ×"
    assert ratio["value"] == pytest.approx(math.exp(0.033))


def test_the_search_over_all_blocks_is_that_of_the_record(full: ReportContent) -> None:
    record = json.loads(report_json(full))["screen"]
    shown = table(full, "exits", "trained for")
    assert [cell.text for cell in column(shown, "block")] == [f"{each['block']}" for each in record["exits"]]
    assert [cell.text for cell in column(shown, "saving")] == [
        f"{100 * each['saving']:+.1f} %" for each in record["exits"]
    ]
    assert [cell.strong for cell in column(shown, "block")] == [each["trained"] for each in record["exits"]]


def test_the_comparison_of_losses_is_that_of_the_record(full: ReportContent) -> None:
    record = next(each for each in json.loads(report_json(full))["exits"] if each["losses"] is not None)
    shown = table(full, "exits", "loss")
    losses = [record["losses"][name] for name in ("start", "top_token", "distribution")]
    assert [cell.text for cell in column(shown, "selective")] == [
        f"{100 * e['selective']:.1f} %" for e in losses
    ]
    assert [row[0].interval for row in shown.cells()] == ["", "serves", ""]


def test_the_rank_sweep_marks_the_papers_ratio(full: ReportContent) -> None:
    shown = table(full, "linear-block", "smaller")
    assert [(row[0].interval, row[2].text) for row in shown.cells()] == [
        ("", "2.6×"),
        ("deployed", "34.0×"),
        ("", "56.7×"),
    ]


def test_the_comparison_with_the_paper_is_that_of_the_record(full: ReportContent) -> None:
    record = json.loads(report_json(full))["trade_off"]
    shown = table(full, "trade-off", "perplexity over")
    assert [cell.text for cell in column(shown, "points")] == [
        f"{each['comparison']['compared']}" for each in record
    ]
    assert [cell.text == "yes" for cell in column(shown, "below")] == [
        each["comparison"]["below"] for each in record
    ]
    assert {each["curve"]["axis"] for each in record} == {"layers", "net"}


def test_what_was_written_is_that_of_the_record(full: ReportContent) -> None:
    record = json.loads(report_json(full))["generation"]
    shown = table(full, "generation", "repeated")
    assert [cell.text for cell in column(shown, "repeated")] == [
        f"{100 * each['repeated']:.1f} %" for each in record
    ]
    assert [cell.text for cell in column(shown, "perplexity")] == [
        f"{each['perplexity']['value']:.2f}" for each in record
    ]
    assert record[1]["target"] == 0.05
    assert record[1]["sample"] == "and they lived 1"


def test_the_ways_of_rounding_are_those_of_the_record(full: ReportContent) -> None:
    record = json.loads(report_json(full))["weight_study"]
    shown = table(full, "weights", "rounding")
    assert [cell.text for cell in column(shown, "change")[1:]] == [
        f"{form['increase']['value']:+.3f}" for form in record["forms"]
    ]
    assert [row[0].text for row in shown.cells() if row[0].interval == "in the bundle"] == ["GPTQ"]
    assert [cell.text for cell in column(shown, "up, outputs")[1:]] == [
        f"{100 * form['output_error']['mlp.up']:.3f} %" for form in record["forms"]
    ]


def test_how_many_tokens_a_gate_alone_would_let_go_is_read_off_its_curve(full: ReportContent) -> None:
    shown = table(full, "gates", "within 5%")
    assert [cell.text for cell in column(shown, "within 5%")] == ["25.0 %", "27.0 %"]
    assert [cell.text for cell in column(shown, "within 2%")] == ["10.0 %", "10.0 %"]
    assert within((), 0.5) == 0.0
    gates = json.loads(report_json(full))["exits"]
    assert [each["gate"]["coverage"][1] for each in gates] == [[0.25, 0.03], [0.27, 0.03]]


def test_the_documents_are_those_of_the_record(full: ReportContent) -> None:
    told = replace(full, text=TextSource(1234, 56))
    facts = {row[0].text: row[1].text for row in table(told, "made", "").cells()}
    assert facts["documents"] == "1,234, dealt whole; 56 repeats of one were left out"
    assert json.loads(report_json(told))["text"] == {"documents": 1234, "repeats": 56, "rows": 0}
    assert json.loads(report_json(full))["text"] is None


def lead(found: ReportContent, name: str) -> str:
    """What a section says before its figures, and its texts."""
    own = next(each for each in sections(found) if each.name == name)
    return " ".join([own.shows, own.limits, *(p.text for p in flat(own.parts) if isinstance(p, Text))])


def test_forms_of_keys_and_values_are_accepted_in_words(full: ReportContent) -> None:
    told = lead(full, "kv")
    assert (
        "(INT4 weights). By KL that holds; by perplexity this text does not decide it: it costs more here"
        in told
    )
    assert (
        "(full weights). By KL that holds; by perplexity this text does not decide it: it costs less" in told
    )
    assert "The longest context here is 64 tokens" in told
    shown = table(full, "kv", "the served form over")
    record = json.loads(report_json(full))["kv_study"]["subjects"][-1]["differences"]
    assert [cell.text for cell in column(shown, "KL")] == [f"{each['kl']['value']:+.4f}" for each in record]


@pytest.mark.parametrize(
    ("increase", "says"),
    [
        (Measure(-0.2, -0.3, -0.1), "by perplexity that holds."),
        (Measure(0.2, 0.1, 0.3), "by perplexity that does not hold: it costs more."),
        (Measure(0.2, math.nan, math.nan), "costs more here, which one block of text does not show"),
    ],
)
def test_an_acceptance_is_judged_by_its_interval(full: ReportContent, increase: Measure, says: str) -> None:
    study = full.kv_study
    assert study is not None
    *others, last = study.subjects
    held = replace(last, differences=(replace(last.differences[0], increase=increase),))
    assert says in lead(replace(full, kv_study=replace(study, subjects=(*others, held))), "kv")


def test_the_trade_off_tells_of_layers_and_of_compute(full: ReportContent) -> None:
    told = lead(full, "trade-off")
    layers, net = (
        told.index("Counted by layers skipped, as the paper counts"),
        told.index("Counted net of what"),
    )
    assert layers < net


def test_points_that_save_nothing_are_what_is_not_below(full: ReportContent) -> None:
    def idle(result: ModeResult) -> ModeResult:
        return replace(result, compute_saved=Measure(-0.05, -0.06, -0.04))

    some = tuple(idle(each) if number == 0 else each for number, each in enumerate(full.table.sweep))
    told = lead(replace(full, table=replace(full.table, sweep=some)), "trade-off")
    assert "1 of them save nothing and cost perplexity all the same" in told
    every = tuple(map(idle, full.table.sweep))
    results = tuple(map(idle, full.table.results))
    told = lead(replace(full, table=replace(full.table, sweep=every, results=results)), "trade-off")
    assert "Counted net of what exits compute, no threshold saves anything" in told


def test_heads_that_were_cut_off_are_marked(full: ReportContent) -> None:
    cells = {row[0].text: row[6] for row in table(full, "exits", "tokens seen").cells()}
    assert {name: cell.interval for name, cell in cells.items()} == {
        "block_0": "cut off, still rising",
        "block_1": "cut off, still rising",
        "block_2": "stopped early",
    }
    record = json.loads(report_json(full))
    marked = {each["name"]: each["still_rising"] for each in (*record["exits"], *record["exits_left_out"])}
    assert marked == {"block_0": True, "block_1": True, "block_2": False}


def test_certificates_say_where_their_level_gives_way(full: ReportContent) -> None:
    plan = full.selection.plan

    def told(correlation: float, units: int, others: int = 77) -> str:
        selection = replace(full.selection, plan=replace(plan, correlation=correlation))
        first = full.certified[0].variant
        outcomes = tuple(
            replace(each, text_blocks=units if each.variant == first else others) for each in full.certified
        )
        return lead(replace(full, selection=selection, certified=outcomes), "certificates")

    assert "up to 8 %" not in told(0.05, 77)
    assert "may be correlated by 0.23, more than 0.1: on such texts simulation has up to 8 %" in told(
        0.23, 77
    )
    assert "Here there are fewer than 40 units: on such texts" in told(0.05, 31)
    few = told(0.05, 77, 39)
    assert (
        "77 of them here, 39 for the other variants. Of a kind of text that is less than 3.8% (7.4%)" in few
    )
    assert "Here the other variants have fewer than 40 units: on such texts" in few
    assert pytest.approx(0.95, abs=2e-3) == 1 - 0.962**77  # the chance that such a kind is there


def test_the_comparison_of_roundings_says_what_is_compared(full: ReportContent) -> None:
    told = lead(full, "weights")
    assert "to nearest, each group's range searched" in told
    assert "NF4's levels in groups of 16" in told
