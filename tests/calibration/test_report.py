"""The report's page: whole, self-contained, the same for the same findings, and with what was found alone."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.json_report import report_json
from exeunt.calibration.report.page import report_html, report_sections
from exeunt.calibration.report.parts import Cell, Details, Figure, Part, Section, Table
from tests.calibration.report_content import DEPLOYED, FULL, bare_content, certified, content, fitted_exit

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


def table(found: ReportContent, section: str, header: str) -> Table:
    """The first table of a section that has a column of that name."""
    own = [each for each in report_sections(found) if each.name == section]
    return next(part for part in parts_of(own) if isinstance(part, Table) and header in part.headers)


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
    pictures, figures = tags.all("svg"), [p for p in parts_of(report_sections(full)) if isinstance(p, Figure)]
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
    assert report_html(full) == page
    assert report_html(content()) == page


def test_sections_come_with_their_data() -> None:
    names = [section.name for section in report_sections(content())]
    assert names[0] == "summary"
    assert names[-1] == "made"
    assert {"modes", "certificates", "exits", "gates", "drafting", "linear-block", "weights"} < set(names)
    bare = report_html(bare_content())
    assert [section.name for section in report_sections(bare_content())] == ["summary", "modes", "made"]
    assert Tags(bare).all("section") == [{"id": "summary"}, {"id": "modes"}, {"id": "made"}]


@pytest.mark.parametrize(
    ("change", "left_out"),
    [
        ({"choice": None}, "linear-block"),
        ({"int4": None}, "weights"),
        ({"certified": ()}, "certificates"),
        ({"candidates": ()}, "exits"),
    ],
)
def test_a_section_is_left_out_alone(change: dict[str, Any], left_out: str) -> None:
    found = content()
    before = [section.name for section in report_sections(found)]
    after = [section.name for section in report_sections(replace(found, **change))]
    assert after == [name for name in before if name != left_out]


def test_every_section_says_what_it_shows_and_what_not(full: ReportContent) -> None:
    for section in report_sections(full):
        assert len(section.shows) > 60, section.name
        assert section.limits, section.name


def test_what_others_wrote_is_escaped() -> None:
    hostile = '<script>alert("1")</script>&amp;'
    found = content(hostile)
    outcomes = (certified(DEPLOYED, reason=hostile), certified(FULL, reason=hostile))
    page = report_html(replace(found, certified=outcomes))
    tags = Tags(page)
    assert not tags.all("script")
    assert f"Calibration of {hostile}" in tags.text
    assert any(hostile in text for text in tags.text if "not certified" in text)


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
    assert [cell.text for cell in column(shown, "change")] == [f"{each['increase']:+.2f}" for each in wanted]
    chosen = [row[0].text for row in shown.cells() if row[0].interval == "chosen"]
    assert chosen == [f"block {record['chosen']}"]


def test_a_gate_is_shown_with_its_own_figures() -> None:
    found = content()
    shown = table(found, "gates", "AUC")
    assert [cell.text for cell in column(shown, "AUC")] == [f"{each.gate.auc:.3f}" for each in found.exits]
    assert fitted_exit(2, 0.5).gate.auc == pytest.approx(0.82)
