"""The report's page: whole, self-contained, the same for the same findings, and with what was found alone."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest

from exeunt.calibration.evaluation import Measure
from exeunt.calibration.kv_forms import PER_CHANNEL
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.json_report import report_json
from exeunt.calibration.report.page import report_html, report_sections
from exeunt.calibration.report.parts import Cell, Details, Figure, Part, Section, Table
from exeunt.calibration.report.sections.certificates import certificates_section
from exeunt.calibration.report.sections.exits import exits_section
from exeunt.calibration.report.sections.gates import gates_section, within
from exeunt.calibration.report.sections.generation import generation_section
from exeunt.calibration.report.sections.kv import kv_section
from exeunt.calibration.report.sections.linear_block import linear_block_section
from exeunt.calibration.report.sections.weights import weights_section
from exeunt.calibration.report.verdict import verdict_of
from exeunt.calibration.risk import Certificate
from tests.calibration.report_content import (
    DEPLOYED,
    FULL,
    KV,
    LINEAR,
    WEIGHTS,
    bare_content,
    certified,
    content,
    fitted_exit,
    written,
)

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Tags(HTMLParser):
    """Notes every element with its attributes, and that all are closed in turn."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def full() -> ReportContent:
    return content()


@pytest.fixture(scope="module")
def page(full: ReportContent) -> str:
    return report_html(full)


def parts_of(sections: list[Section]) -> Iterator[Part]:
    for section in sections:
        yield from flat(section.parts)


def flat(parts: tuple[Part, ...]) -> Iterator[Part]:
    for part in parts:
        yield part
        if isinstance(part, Details):
            yield from flat(part.parts)


@cache
def _sections(number: int) -> list[Section]:
    return report_sections(_held[number])


_held: dict[int, ReportContent] = {}


def sections(found: ReportContent) -> list[Section]:
    """The sections of a report, drawn once."""
    _held[id(found)] = found  # kept, so that the number stays its own
    return _sections(id(found))


def table(found: ReportContent, section: str, header: str) -> Table:
    """The first table of a section that has a column of that name."""
    own = next(each for each in sections(found) if each.name == section)
    return next(part for part in flat(own.parts) if isinstance(part, Table) and header in part.headers)


def column(found: Table, header: str) -> list[Cell]:
    return [row[found.headers.index(header)] for row in found.cells()]


def test_the_page_is_whole(page: str) -> None:
    tags = Tags(page)
    assert page.startswith("<!doctype html>")
    assert len(tags.all("html")) == len(tags.all("body")) == len(tags.all("h1")) == 1
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in tags.all("meta")


def test_nothing_is_fetched_and_nothing_is_run(page: str) -> None:
    tags = Tags(page)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {name for name, _ in tags.elements}
    for _, attributes in tags.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href", "action"):
                assert (value or "").startswith("#")
    assert not re.search(r"url\((?!#)|@import|@font-face", page)
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {"http://www.w3.org/2000/svg"}


def test_ids_are_unique_and_every_reference_is_met(page: str) -> None:
    tags = Tags(page)
    ids = [attributes["id"] for _, attributes in tags.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = re.findall(r'(?:href="#|url\(#)([^")]+)', page)
    assert wanted
    assert set(wanted) <= set(ids)


def test_pictures_have_names_labels_and_captions(full: ReportContent, page: str) -> None:
    tags = Tags(page)
    pictures, figures = tags.all("svg"), [p for p in parts_of(sections(full)) if isinstance(p, Figure)]
    assert [each["id"] for each in pictures] == [f"figure-{figure.name}" for figure in figures]
    assert len(pictures) == len(tags.all("figcaption")) >= 6
    assert all(each["role"] == "img" and len(each["aria-label"] or "") > 20 for each in pictures)
    assert all(len(figure.caption) > 40 for figure in figures)


def test_pictures_take_their_colours_from_the_page(page: str) -> None:
    svg = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--ink)" in svg
    assert "var(--series-1)" in svg
    assert not re.search(r"#[0-9a-fA-F]{6}\b", svg)
    for variable in set(re.findall(r"var\(--([a-z0-9-]+)\)", page)):
        assert len(re.findall(rf"--{variable}:", page)) >= (1 if variable == "sans" else 2), variable


def test_text_stays_text(page: str) -> None:
    assert "<text" in page
    assert "agreement, %" in Tags(page).text


def test_same_findings_same_bytes(full: ReportContent, page: str) -> None:
    assert report_html(content()) == page


def test_sections_come_with_their_data(full: ReportContent) -> None:
    names = [section.name for section in sections(full)]
    assert names[0] == "summary"
    assert names[-1] == "made"
    assert {
        "modes",
        "certificates",
        "exits",
        "gates",
        "drafting",
        "linear-block",
        "weights",
        "kv",
        "trade-off",
    } < set(names)
    bare = report_html(bare_content())
    assert [section.name for section in report_sections(bare_content())] == ["summary", "modes", "made"]
    assert Tags(bare).all("section") == [{"id": "summary"}, {"id": "modes"}, {"id": "made"}]


@pytest.mark.parametrize(
    ("change", "build"),
    [
        ({"choice": None}, linear_block_section),
        ({"int4": None}, weights_section),
        ({"certified": ()}, certificates_section),
        ({"candidates": ()}, exits_section),
        ({"kv_study": None}, kv_section),
        ({"written": ()}, generation_section),
    ],
)
def test_a_section_is_left_out_where_there_is_nothing_to_tell(
    full: ReportContent, change: dict[str, Any], build: Callable[[ReportContent], Section | None]
) -> None:
    assert build(replace(full, **change)) is None
    assert build(full) in sections(full)


def test_every_section_says_what_it_shows_and_what_not(full: ReportContent) -> None:
    for section in sections(full):
        assert len(section.shows) > 60, section.name
        assert section.limits, section.name


def test_what_others_wrote_is_escaped() -> None:
    hostile = '<script>alert("1")</script>&amp;'
    found = content(hostile)
    outcomes = (certified(DEPLOYED, reason=hostile), certified(FULL, reason=hostile))
    page = report_html(replace(found, certified=outcomes, written=written(hostile)))
    tags = Tags(page)
    assert not tags.all("script")
    assert f"Calibration of {hostile}" in tags.text
    assert any(hostile in text for text in tags.text if "not certified" in text)
    assert f"{hostile} 1" in tags.text


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
    assert [cell.text for cell in column(shown, "certified")] == ["no", "at 5%", "no", "no"]


def test_the_forms_of_the_cache_are_those_of_the_record(full: ReportContent) -> None:
    record = json.loads(report_json(full))["kv_study"]["subjects"]
    shown = table(full, "kv", "error of keys")
    int4 = next(each for each in record if each["weights"] == "int4")
    assert [cell.text for cell in column(shown, "change")[1:]] == [
        f"{cost['increase']['value']:+.3f}" for cost in int4["costs"]
    ]
    kept_out = [row[0].interval for row in shown.cells() if row[0].text == PER_CHANNEL.name]
    assert kept_out == ["cannot be served"]


def test_the_options_are_shown_without_the_machines_folders(full: ReportContent, page: str) -> None:
    shown = {row[0].text: row[1].text for row in table(full, "made", "option").cells()}
    assert shown["exits"] == "[0, 2]"
    assert shown["head.learning_rate"] == str(full.options.head.learning_rate if full.options else None)
    assert "secret" not in page
    assert "secret" not in report_json(full)


def test_the_verdict_calls_costs_by_the_end_of_their_interval() -> None:
    verdict = verdict_of(content())
    called = {cost.variant: cost.tone for cost in verdict.together}
    assert called[WEIGHTS] == "fair"  # 0.123 + 0.105 of 20: more than 1 % at its end
    assert called[LINEAR] == "bad"
    assert [cost.variant for cost in verdict.alone] == [WEIGHTS, KV, LINEAR]
    assert [(each.cost.variant, each.target) for each in verdict.advice] == [
        (FULL, None),  # no saving stays within 1 %
        (DEPLOYED, None),
        (DEPLOYED, 0.05),
    ]


def test_exits_that_save_no_compute_are_not_advised() -> None:
    found = content()
    results = tuple(replace(each, compute_saved=Measure(-0.1, -0.2, 0.0)) for each in found.table.results)
    verdict = verdict_of(replace(found, table=replace(found.table, results=results)))
    assert [each.target for each in verdict.advice] == [None, None]


def test_a_cost_that_the_text_cannot_show_is_called_so() -> None:
    found = content()
    unclear = replace(found.table.results[1], perplexity_increase=Measure(0.01, -0.05, 0.08))
    results = (found.table.results[0], unclear, *found.table.results[2:])
    cost = verdict_of(replace(found, table=replace(found.table, results=results))).alone[0]
    assert not cost.shown
    assert cost.tone == "good"


def test_nothing_certified_is_said_in_the_verdict() -> None:
    found = content()
    refused = certified(DEPLOYED)
    targets = tuple(
        Certificate(each.target, None, 3, 3000, 0.4, 0.9, "too few")
        for each in refused.certification.certificates
    )
    outcome = replace(refused, certification=replace(refused.certification, certificates=targets))
    page = report_html(replace(found, certified=(outcome,)))
    assert "No risk target is certified" in page
    assert "5%, the loosest target: too few." in page


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


def test_weights_are_shown_without_a_comparison_too(full: ReportContent) -> None:
    section = weights_section(replace(full, weight_study=None))
    assert section is not None
    assert [part.name for part in section.parts if isinstance(part, Figure)] == ["weight-errors"]


def test_how_many_tokens_a_gate_alone_would_let_go_is_read_off_its_curve(full: ReportContent) -> None:
    shown = table(full, "gates", "within 5%")
    assert [cell.text for cell in column(shown, "within 5%")] == ["25.0 %", "27.0 %"]
    assert [cell.text for cell in column(shown, "within 2%")] == ["10.0 %", "10.0 %"]
    assert within((), 0.5) == 0.0
    gates = json.loads(report_json(full))["exits"]
    assert [each["gate"]["coverage"][1] for each in gates] == [[0.25, 0.03], [0.27, 0.03]]


def test_gates_without_curves_are_shown_by_their_reliability(full: ReportContent) -> None:
    quality = replace(full.exits[0].gate, roc=(), coverage=())
    bare = replace(full.exits[0], gate=quality)
    section = gates_section(
        replace(full, selection=replace(full.selection, certified=(bare,), drafting=None))
    )
    assert section is not None
    assert [part.name for part in section.parts if isinstance(part, Figure)] == ["reliability"]
