"""The report's page: whole, self-contained, the same for the same findings, and with what was found alone."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.json_report import report_json
from exeunt.calibration.report.page import report_html, report_sections
from exeunt.calibration.report.parts import Figure, Section
from exeunt.calibration.report.sections.certificates import certificates_section
from exeunt.calibration.report.sections.exits import exits_section
from exeunt.calibration.report.sections.gates import gates_section
from exeunt.calibration.report.sections.generation import generation_section
from exeunt.calibration.report.sections.kv import kv_section
from exeunt.calibration.report.sections.linear_block import linear_block_section
from exeunt.calibration.report.sections.weights import weights_section
from tests.calibration.report_content import (
    DEPLOYED,
    FULL,
    bare_content,
    certified,
    content,
    written,
)
from tests.calibration.report_page import Tags, parts_of, sections, table


@pytest.fixture(scope="module")
def full() -> ReportContent:
    return content()


@pytest.fixture(scope="module")
def page(full: ReportContent) -> str:
    return report_html(full)


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


def test_the_options_are_shown_without_the_machines_folders(full: ReportContent, page: str) -> None:
    shown = {row[0].text: row[1].text for row in table(full, "made", "option").cells()}
    assert shown["exits"] == "[0, 2]"
    assert shown["head.learning_rate"] == str(full.options.head.learning_rate if full.options else None)
    assert "secret" not in page
    assert "secret" not in report_json(full)


def test_weights_are_shown_without_a_comparison_too(full: ReportContent) -> None:
    section = weights_section(replace(full, weight_study=None))
    assert section is not None
    assert [part.name for part in section.parts if isinstance(part, Figure)] == ["weight-errors"]


def test_gates_without_curves_are_shown_by_their_reliability(full: ReportContent) -> None:
    quality = replace(full.exits[0].gate, roc=(), coverage=())
    bare = replace(full.exits[0], gate=quality)
    section = gates_section(
        replace(full, selection=replace(full.selection, certified=(bare,), drafting=None))
    )
    assert section is not None
    assert [part.name for part in section.parts if isinstance(part, Figure)] == ["reliability"]
