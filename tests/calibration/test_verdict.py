"""The verdict: what costs are called, what is certified, and which modes are advised."""

import json
import math
from dataclasses import replace

import pytest

from exeunt.calibration.certificates import CertifiedVariant
from exeunt.calibration.evaluation import Measure, Mode
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.json_report import report_json
from exeunt.calibration.report.page import report_html
from exeunt.calibration.report.verdict import verdict_of
from exeunt.calibration.risk import Certificate
from tests.calibration.report_content import (
    DEPLOYED,
    FULL,
    KV,
    LINEAR,
    WEIGHTS,
    certified,
    content,
)
from tests.calibration.report_page import Tags


def test_the_verdict_calls_costs_by_the_end_of_their_interval() -> None:
    verdict = verdict_of(content())
    called = {cost.variant: cost.tone for cost in verdict.together}
    assert called[WEIGHTS] == "fair"  # 0.123 + 0.105 of 20: more than 1 % at its end
    assert called[LINEAR] == "bad"
    assert [cost.variant for cost in verdict.alone] == [WEIGHTS, KV, LINEAR]
    assert [each.cost.variant for each in verdict.advice if each.exits is None] == [
        FULL,  # no saving stays within 1 %
        DEPLOYED,
    ]


def advised(found: ReportContent) -> list[object]:
    """What the requests that are advised say of exits."""
    return [each.request["early_exit"] for each in verdict_of(found).advice]


def with_compute_saved(found: ReportContent, saved: float) -> ReportContent:
    measure = Measure(saved, saved - 0.1, saved + 0.1)
    results = tuple(replace(each, compute_saved=measure) for each in found.table.results)
    return replace(found, table=replace(found.table, results=results))


def test_exits_are_advised_by_either_risk_backfilled_where_that_saves() -> None:
    verified = {"mode": "verified"}
    assert advised(content()) == [
        verified,
        verified,
        {"mode": "approximate", "max_disagreement": 0.05, "skipped_kv": "backfill"},
        {"mode": "approximate", "max_nll_increase": 0.05, "skipped_kv": "backfill"},
    ]


def test_exits_are_advised_propagated_where_backfill_is_not_certified() -> None:
    found = content()
    results = tuple(each for each in found.table.results if each.mode.skipped_kv == "propagate")
    propagated = {"mode": "approximate", "max_disagreement": 0.05, "skipped_kv": "propagate"}
    assert advised(replace(found, table=replace(found.table, results=results)))[2:] == [propagated]


def test_exits_that_cost_more_than_the_passes_they_save_are_not_advised() -> None:
    # 0.1 and 0.15 of the passes are saved
    assert len(advised(with_compute_saved(content(), -0.2))) == 2
    assert len(advised(with_compute_saved(content(), -0.12))) == 3


def without_certificates(outcome: CertifiedVariant) -> CertifiedVariant:
    targets = tuple(
        Certificate(each.target, None, 3, 3000, 0.4, 0.9, "too few")
        for each in outcome.certification.certificates
    )
    return replace(outcome, certification=replace(outcome.certification, certificates=targets), nll=None)


def test_the_verdict_is_of_backfill_unless_propagate_alone_is_certified() -> None:
    found = content()
    backfilled = next(each for each in found.certified if each.skipped_kv == "backfill")
    assert verdict_of(found).deployed == backfilled
    less = tuple(without_certificates(each) if each == backfilled else each for each in found.certified)
    told = verdict_of(replace(found, certified=less)).deployed
    assert told is not None
    assert (told.variant, told.skipped_kv) == (DEPLOYED, "propagate")
    none = tuple(map(without_certificates, found.certified))
    told = verdict_of(replace(found, certified=none)).deployed
    assert told is not None
    assert told.skipped_kv == "backfill"


def test_the_verdict_tells_of_both_risks() -> None:
    text = " ".join(Tags(report_html(content())).text)
    assert "1 of 2 targets of disagreement and 1 of 2 targets of likelihood are certified" in text
    assert "20.0 % with at most 5% of these wrong or 30.0 % with the text at most 0.05 nats" in text
    assert "their skipped keys and values backfilled" in text
    assert "5%: 20.0 % leave, perplexity +1.0 %." in text
    assert "0.05: 30.0 % leave, perplexity +1.0 %." in text
    assert "up to 15.0 % of the passes need not be waited for, and exits themselves compute 6.0 %" in text
    record = json.loads(report_json(content()))["verdict"]["certified"]
    assert record["skipped_kv"] == "backfill"
    assert (record["max_disagreement"], record["max_nll_increase"]) == ([0.05], [0.05])


def test_one_risk_alone_may_be_certified() -> None:
    found = content()
    outcomes = tuple(
        replace(each, certification=without_certificates(each).certification) for each in found.certified
    )
    page = report_html(replace(found, certified=outcomes))
    assert "No bound on how many of those that leave differ is certified." in page
    assert "30.0 % with the text at most 0.05 nats a token less likely may leave" in page


def test_a_cost_that_the_text_cannot_show_is_called_so() -> None:
    found = content()
    unclear = replace(
        found.table.results[1],
        perplexity_increase=Measure(0.01, -0.05, 0.08),
        kl=Measure(0.004, 0.003, 0.005),
    )
    results = (found.table.results[0], unclear, *found.table.results[2:])
    cost = verdict_of(replace(found, table=replace(found.table, results=results))).alone[0]
    assert not cost.shown
    assert cost.tone == "good"


def with_first_saving(
    found: ReportContent, perplexity_increase: Measure, kl: Measure | None = None
) -> ReportContent:
    """The findings with other figures of the first saving, INT4 weights alone."""
    full, first, *others = found.table.results
    changed = replace(first, perplexity_increase=perplexity_increase, kl=first.kl if kl is None else kl)
    results = (full, changed, *others)
    return replace(found, table=replace(found.table, results=results))


def test_a_fall_of_perplexity_is_not_called_too_little_text() -> None:
    found = with_first_saving(content(), perplexity_increase=Measure(-0.4, -0.6, -0.2))
    cost = verdict_of(found).alone[0]
    assert cost.shown
    assert cost.better
    text = " ".join(Tags(report_html(found)).text)
    (told,) = [part for part in text.split("INT4 weights: ") if part.startswith("-2.0 % perplexity")]
    assert "It is better than the full model on this text" in told[:400]
    assert "do not count on that" in told[:400]
    assert "holds zero" not in told[:400]


def test_the_opening_does_not_count_on_a_fall_of_perplexity() -> None:
    found = content()
    results = tuple(
        replace(each, perplexity_increase=Measure(-0.4, -0.6, -0.2)) if each.mode == Mode(DEPLOYED) else each
        for each in found.table.results
    )
    text = " ".join(Tags(report_html(replace(found, table=replace(found.table, results=results)))).text)
    assert "(-2.0 %), better than the full model on this text, which is not to be counted on" in text
    assert "too short to tell from nothing" not in text


@pytest.mark.parametrize(("kl", "tone"), [(0.13, "bad"), (0.04, "fair"), (0.008, "good")])
def test_a_cost_is_called_by_kl_too(kl: float, tone: str) -> None:
    cheap = Measure(-0.5, -0.9, -0.1)
    found = with_first_saving(
        content(), perplexity_increase=cheap, kl=Measure(kl, 0.9 * kl, min(1.1 * kl, 0.3))
    )
    cost = verdict_of(found).alone[0]
    assert cost.tone == tone
    assert f"{kl:.3f} [" in " ".join(Tags(report_html(found)).text)
    quality_first = verdict_of(found).advice[0].cost.variant
    assert quality_first == (WEIGHTS if tone == "good" else FULL)


def test_a_kl_without_an_interval_counts_by_its_value() -> None:
    found = with_first_saving(
        content(), perplexity_increase=Measure(0.0, -0.1, 0.1), kl=Measure(0.06, math.nan, math.nan)
    )
    assert verdict_of(found).alone[0].tone == "bad"


def test_exits_are_not_advised_on_the_luck_of_what_they_stand_on() -> None:
    found = content()
    dear = Measure(1.08, 1.02, 1.12)
    results = tuple(
        each if each.exits_ratio is None else replace(each, exits_ratio=dear) for each in found.table.results
    )
    by_likelihood = {"mode": "approximate", "max_nll_increase": 0.05, "skipped_kv": "backfill"}
    assert advised(replace(found, table=replace(found.table, results=results)))[2:] == [by_likelihood]
    looser = tuple(
        replace(each, mode=replace(each.mode, nll_target=0.1)) if each.mode.nll_target else each
        for each in results
    )
    none = replace(found, table=replace(found.table, results=looser))
    assert advised(none)[2:] == []
    told = "None of them is advised below"
    assert told in report_html(none)
    assert told not in report_html(found)


def test_exits_that_lie_far_from_the_full_model_are_not_advised() -> None:
    found = content()
    results = tuple(
        each if each.mode.nll_target is None else replace(each, kl=Measure(0.3, 0.28, 0.36))
        for each in found.table.results
    )
    asked = advised(replace(found, table=replace(found.table, results=results)))
    assert not any(isinstance(each, dict) and "max_nll_increase" in each for each in asked)


def test_nothing_certified_is_said_in_the_verdict() -> None:
    found = content()
    page = report_html(replace(found, certified=(without_certificates(certified(DEPLOYED)),)))
    assert "No risk target is certified" in page
    assert "5% that differ, the loosest target: too few." in page


def test_a_cost_without_an_interval_is_called_nothing() -> None:
    found = content()
    lone = Measure(0.9, math.nan, math.nan)
    results = tuple(
        each if each.mode == Mode(FULL) else replace(each, perplexity_increase=lone, exits_ratio=lone)
        for each in found.table.results
    )
    bare = replace(found, table=replace(found.table, results=results))
    verdict = verdict_of(bare)
    assert {each.tone for each in verdict.alone} == {""}
    assert not any(each.shown for each in verdict.alone)
    assert [each.cost.variant for each in verdict.advice] == [FULL]
    text = " ".join(Tags(report_html(bare)).text)
    assert "+0.90 [–]. All text was one block, which gives no interval" in text
    assert "no interval" in text
    assert "nan" not in text
    record = json.loads(report_json(bare), parse_constant=pytest.fail)
    assert record["verdict"]["costs"][0]["increase"] == {"value": 0.9, "low": None, "high": None}
