"""The verdict in plain words: what each saving costs, what is certified, what to use."""

import json
from collections.abc import Sequence

from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.parts import Cell, Details, Finding, Listing, Section, Table, Tone
from exeunt.calibration.report.verdict import FAIR, SMALL, Advice, Cost, Verdict, result_of, verdict_of
from exeunt.calibration.report.words import (
    count,
    in_words,
    measured,
    plain,
    share,
    signed_share,
    variant_name,
)
from exeunt.calibration.risk import percent
from exeunt.compression.variant import Variant


def summary_section(content: ReportContent) -> Section:
    """The section; every calibration has one."""
    verdict = verdict_of(content)
    table = content.table
    findings = [
        *(_saving(cost) for cost in verdict.alone),
        *_exits(content, verdict),
        *_drafts(content),
    ]
    requests = [
        Listing(json.dumps({"compression": each.request}), f"{each.use}: {variant_name(each.cost.variant)}")
        for each in verdict.advice
    ]
    return Section(
        "summary",
        "Verdict",
        _opening(verdict, table.tokens),
        f"Everything on this page was measured on text that nothing was fitted on ({table.text}); on other "
        "text figures differ, so measure yours with “exeunt eval”.",
        (
            *findings,
            *([_advice(content, verdict.advice)] if verdict.advice else []),
            *([Details("What such a request asks for", tuple(requests))] if requests else []),
        ),
    )


def _opening(verdict: Verdict, tokens: int) -> str:
    base = verdict.reference.perplexity.value
    if not verdict.together:
        return (
            f"Nothing is compressed in this bundle; its perplexity is {base:.2f} on {count(tokens)} tokens."
        )
    without = [cost for cost in verdict.together if not cost.variant.linear_block] or list(verdict.together)
    most = max(without, key=lambda cost: (cost.variant.weights == "int4") + (cost.variant.kv_cache == "int4"))
    sure = "" if most.shown else ", which this text is too short to tell from nothing"
    return (
        f"{variant_name(most.variant)} cost {in_words(most.increase)} perplexity of {base:.2f} "
        f"({signed_share(most.relative.value)}){sure}, on {count(tokens)} tokens; in brackets the 95 % interval. "
        f"A cost is called small while its interval stays within {percent(SMALL)} of the full model's, fair "
        f"within {percent(FAIR)}, large beyond. " + _certified_words(verdict)
    )


def _certified_words(verdict: Verdict) -> str:
    if verdict.deployed is None:
        return "There are no exits in this bundle."
    held = [each for each in verdict.certified if each.certified]
    if not held:
        return "No risk target is certified for exits: the server refuses them by name."
    best = max(held, key=lambda each: each.exits)
    return (
        f"{len(held)} of {len(verdict.certified)} risk targets are certified for exits: with at most "
        f"{percent(best.target)} of them wrong, {share(best.exits / best.tokens)} of the tokens may leave early."
    )


_SAVES = {
    Variant("int4", "full", False): "INT4 weights",
    Variant("full", "int4", False): "INT4 keys and values",
    Variant("full", "full", True): "Linear block",
}
_CALLED: dict[Tone, str] = {"good": "small", "fair": "fair", "bad": "large"}


def _saving(cost: Cost) -> Finding:
    called = _CALLED[cost.tone]
    rest = "" if cost.shown else " The interval holds zero: it takes more text to tell this cost from none."
    act = {
        "good": "Use it.",
        "fair": "Use it where memory or speed is worth that.",
        "bad": "Leave it off unless ",
    }
    advice = act[cost.tone] + ("its saving is worth more than that." if cost.tone == "bad" else "")
    return Finding(
        f"{_SAVES.get(cost.variant, variant_name(cost.variant))}: {signed_share(cost.relative.value)} perplexity",
        f"A {called} cost: {in_words(cost.increase)}, at most {signed_share(cost.relative.high)}.{rest} {advice}",
        cost.tone,
    )


def _exits(content: ReportContent, verdict: Verdict) -> list[Finding]:
    if verdict.deployed is None:
        return []
    held = [each for each in verdict.certified if each.certified]
    if not held:
        loosest = max(verdict.certified, key=lambda each: each.target)
        return [
            Finding(
                "Exits: nothing certified",
                f"{percent(loosest.target)}, the loosest target: {loosest.reason}. Use the verified mode, or "
                "calibrate on more text.",
                "bad",
            )
        ]
    lines = "; ".join(
        f"{percent(each.target)}: {share(each.exits / each.tokens)} leave"
        + (f", {cost}" if (cost := _target_cost(content, verdict.deployed, each.target)) else "")
        for each in held
    )
    net = _net(content, verdict.deployed)
    complete = len(held) == len(verdict.certified)
    return [
        Finding(
            f"Exits: {len(held)} of {len(verdict.certified)} targets certified",
            f"At most that share of the tokens that leave differs from full depth, at 95 % confidence. {lines}."
            f"{_likelihood(verdict)}{net}",
            "good" if complete and not net else "fair",
        )
    ]


def _net(content: ReportContent, deployed: Variant) -> str:
    """That exits save no compute, where they do not."""
    own = [
        each
        for each in content.table.results
        if each.mode.variant == deployed and each.mode.target is not None
    ]
    if not own or any(each.compute_saved.value > 0 for each in own):
        return ""
    return (
        " They skip passes, but with what gates and projections compute themselves none of them saves compute on this "
        "model."
    )


def _likelihood(verdict: Verdict) -> str:
    """What the second risk lets leave."""
    if not verdict.likelihood:
        return ""
    held = [each for each in verdict.likelihood if each.certified]
    if not held:
        return " No bound on the likelihood of the text is certified."
    best = max(held, key=lambda each: each.target)
    return f" With the text at most {best.target:g} nats a token less likely, {share(best.exits / best.tokens)} leave."


def _target_cost(content: ReportContent, deployed: Variant, target: float) -> str:
    at, off = result_of(content.table, deployed, target), result_of(content.table, deployed)
    return (
        "" if at is None or off is None else f"perplexity {at.perplexity.value - off.perplexity.value:+.2f}"
    )


def _drafts(content: ReportContent) -> list[Finding]:
    drafting = content.selection.drafting
    if drafting is None:
        return []
    plan = drafting.choice.plan
    pays = plan.speed > 1.0
    expected = f"{plan.speed:.2f}× is expected on the machine that calibrated, one stream, greedy"
    return [
        Finding(
            f"Verified exits: no loss, {plan.speed:.2f}× expected",
            f"Full depth confirms every draft, so the output is that of exits off. {expected}"
            + (
                "."
                if pays
                else ": drafts are not expected to pay there; the server drafts only where they do."
            ),
            "good" if pays else "fair",
        )
    ]


def _advice(content: ReportContent, advice: Sequence[Advice]) -> Table:
    rows = []
    for each in advice:
        variant = each.cost.variant
        result = result_of(content.table, variant, each.target)
        exits = "verified" if each.target is None else f"at most {percent(each.target)} differ"
        rows.append(
            [
                Cell(each.use, strong=True),
                Cell(variant_name(variant)),
                Cell(exits),
                Cell(plain(None if result is None else result.perplexity.value)),
                measured(each.cost.relative, "{:+.1f} %", each.cost.tone, 100.0),
                Cell(share(None if result is None or each.target is None else result.compute_saved.value)),
            ]
        )
    headers = ("what to use", "savings", "exits", "perplexity", "change", "compute saved by exits")
    return Table(headers, rows, words=3)
