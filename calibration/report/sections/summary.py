"""The verdict in plain words: what each saving costs, what is certified, what to use."""

import json
from collections.abc import Sequence

from exeunt.calibration.certificates import CertifiedVariant
from exeunt.calibration.nll_risk import NllCertificate
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.parts import Cell, Details, Finding, Listing, Section, Table, Tone
from exeunt.calibration.report.verdict import (
    FAIR,
    SMALL,
    Advice,
    Cost,
    Verdict,
    net_saving,
    result_of,
    verdict_of,
)
from exeunt.calibration.report.words import (
    count,
    in_words,
    measured,
    plain,
    promised,
    share,
    signed_share,
    skipped_name,
    variant_name,
)
from exeunt.calibration.risk import Certificate, percent
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
        _opening(verdict, table.tokens, content.selection.drafting is not None),
        f"These figures are of text that nothing was fitted or chosen on ({table.text}), but that thresholds were "
        "certified on. Where a section shows how a choice was made, its figures are of the text that the choice was "
        "made by, and lean to the good side. On other text all differ, so measure yours with “exeunt eval”.",
        (
            *findings,
            *([_advice(content, verdict.advice)] if verdict.advice else []),
            *([Details("What such a request asks for", tuple(requests))] if requests else []),
        ),
    )


def _opening(verdict: Verdict, tokens: int, drafts: bool) -> str:
    base = verdict.reference.perplexity.value
    if not verdict.together:
        return (
            f"Nothing is compressed in this bundle; its perplexity is {base:.2f} on {count(tokens)} tokens."
        )
    without = [cost for cost in verdict.together if not cost.variant.linear_block] or list(verdict.together)
    most = max(without, key=lambda cost: (cost.variant.weights == "int4") + (cost.variant.kv_cache == "int4"))
    return (
        f"{variant_name(most.variant)} cost {in_words(most.increase)} perplexity of {base:.2f} "
        f"({signed_share(most.relative.value)}){_sure(most)}, and lie {in_words(most.kl, '{:.3f}')} nats a token of KL "
        f"from the full model, on {count(tokens)} tokens; in brackets the 95 % interval. {_RULE} "
        + _certified_words(verdict, drafts)
    )


_RULE = (
    f"A cost is called small while the intervals of both stay within {percent(SMALL)} of the full model's perplexity "
    f"and {SMALL:g} nats of KL, fair within {percent(FAIR)} and {FAIR:g} nats, large beyond: on text that the full "
    "model itself writes so many nats of KL raise perplexity by that share, and unlike perplexity KL hears of all "
    "tokens that might have followed."
)


def _sure(cost: Cost) -> str:
    """How far the change of perplexity is to be relied on, where it is no plain rise."""
    if cost.better:
        return ", better than the full model on this text, which is not to be counted on"
    return "" if cost.shown else ", which this text is too short to tell from nothing"


def _certified_words(verdict: Verdict, drafts: bool) -> str:
    outcome = verdict.deployed
    if outcome is None and drafts:
        return "The exit in this bundle drafts for the verified mode alone: nothing is certified."
    if outcome is None:
        return "There are no exits in this bundle."
    held = [each for each in outcome.certification.certificates if each.certified]
    likelihood = [each for each in _likelihood(outcome) if each.certified]
    if not held and not likelihood:
        return "No risk target is certified for exits: the server refuses them by name."
    may = []
    if held:
        best = max(held, key=lambda each: each.exits)
        may.append(f"{share(best.exits / best.tokens)} with at most {percent(best.target)} of these wrong")
    if likelihood:
        loosest = max(likelihood, key=lambda each: each.exits)
        may.append(
            f"{share(loosest.exits / loosest.tokens)} with the text at most {loosest.target:g} nats a token less likely"
        )
    return (
        f"For exits {_held(outcome)} are certified: of the tokens {' or '.join(may)} may leave early, their skipped "
        f"keys and values {skipped_name(outcome.skipped_kv)}."
    )


def _likelihood(outcome: CertifiedVariant) -> tuple[NllCertificate, ...]:
    return () if outcome.nll is None else outcome.nll.certificates


def _held(outcome: CertifiedVariant) -> str:
    """How many targets of each risk are certified."""
    of_risks = (("disagreement", outcome.certification.certificates), ("likelihood", _likelihood(outcome)))
    return " and ".join(
        f"{sum(each.certified for each in targets)} of {len(targets)} targets of {risk}"
        for risk, targets in of_risks
        if targets
    )


_SAVES = {
    Variant("int4", "full", False): "INT4 weights",
    Variant("full", "int4", False): "INT4 keys and values",
    Variant("full", "full", True): "Linear block",
}
_CALLED: dict[Tone, str] = {"good": "small", "fair": "fair", "bad": "large"}


def _saving(cost: Cost) -> Finding:
    name = f"{_SAVES.get(cost.variant, variant_name(cost.variant))}: {signed_share(cost.relative.value)} perplexity"
    if not cost.relative.bounded:
        told = "All text was one block, which gives no interval: it takes more text to tell this cost."
        return Finding(name, f"{in_words(cost.increase)}. {told}", "fair")
    act = {
        "good": "Use it.",
        "fair": "Use it where memory or speed is worth that.",
        "bad": "Leave it off unless its saving is worth more than that.",
    }
    return Finding(
        name,
        f"A {_CALLED[cost.tone]} cost: {in_words(cost.increase)}, at most {signed_share(cost.relative.high)}; KL to "
        f"the full model {in_words(cost.kl, '{:.3f}')} nats a token.{_unsure(cost)} {act[cost.tone]}",
        cost.tone,
    )


def _unsure(cost: Cost) -> str:
    """What the text does not show of a cost, as sentences of their own."""
    if cost.better:
        return (
            " It is better than the full model on this text, by chance or by its kind: do not count on that."
        )
    if not cost.shown:
        return " The interval holds zero: it takes more text to tell this cost from none."
    return ""


def _exits(content: ReportContent, verdict: Verdict) -> list[Finding]:
    """What is certified of exits, by risk."""
    outcome = verdict.deployed
    if outcome is None:
        return []
    tested = (outcome.certification.certificates, _likelihood(outcome))
    if not any(each.certified for targets in tested for each in targets):
        return [_nothing_certified(outcome)]
    complete = all(each.certified for targets in tested for each in targets)
    saved, pays = _saved(content, outcome.variant)
    advised = any(each.exits is not None for each in verdict.advice)
    parts = [
        _disagreement_words(content, outcome),
        _likelihood_words(content, outcome),
        saved,
        "" if advised else _NOT_ADVISED,
    ]
    return [
        Finding(
            f"Exits: {_held(outcome)} certified",
            f"At 95 % confidence, skipped keys and values {skipped_name(outcome.skipped_kv)}. "
            + " ".join(part for part in parts if part),
            "good" if complete and pays and advised else "fair",
        )
    ]


_NOT_ADVISED = (
    "None of them is advised below: those that save something cost more than a fair amount, by perplexity or by KL, "
    "beside the savings that they come on top of, or save nothing net. A certificate bounds a risk; whether that pays "
    "is another question."
)


def _nothing_certified(outcome: CertifiedVariant) -> Finding:
    reasons = []
    if outcome.certification.certificates:
        loosest = max(outcome.certification.certificates, key=lambda each: each.target)
        reasons.append(f"{percent(loosest.target)} that differ, the loosest target: {loosest.reason}.")
    if _likelihood(outcome):
        dearest = max(_likelihood(outcome), key=lambda each: each.target)
        reasons.append(f"{dearest.target:g} nats a token, the loosest of the other risk: {dearest.reason}.")
    return Finding(
        "Exits: nothing certified",
        f"{' '.join(reasons)} Use the verified mode, or calibrate on more text.",
        "bad",
    )


def _disagreement_words(content: ReportContent, outcome: CertifiedVariant) -> str:
    """What may leave at each target of disagreement."""
    targets = outcome.certification.certificates
    lines = [
        f"{percent(each.target)}: {_leaving(content, outcome, each)}" for each in targets if each.certified
    ]
    if not lines:
        return "No bound on how many of those that leave differ is certified." if targets else ""
    return f"Of those that leave at most so many differ from full depth: {'; '.join(lines)}."


def _likelihood_words(content: ReportContent, outcome: CertifiedVariant) -> str:
    """What may leave at each target of the NLL increase."""
    targets = _likelihood(outcome)
    lines = [f"{each.target:g}: {_leaving(content, outcome, each)}" for each in targets if each.certified]
    if not lines:
        return "No bound on the likelihood of the text is certified." if targets else ""
    return f"The text becomes less likely by at most so many nats a token: {'; '.join(lines)}."


def _leaving(content: ReportContent, outcome: CertifiedVariant, each: Certificate | NllCertificate) -> str:
    """The share that leaves at a certified target, and what it costs where that was measured."""
    at = result_of(content.table, outcome.variant, each, outcome.skipped_kv)
    leaves = f"{share(each.exits / each.tokens)} leave"
    if at is None or at.exits_ratio is None:
        return leaves
    return f"{leaves}, perplexity {signed_share(at.exits_ratio.value - 1.0)}"


def _saved(content: ReportContent, deployed: Variant) -> tuple[str, bool]:
    """What the deployed variant's certified exits save at best, by either way with skipped KV, and whether any do."""
    own = [each for each in content.table.results if each.mode.variant == deployed and each.mode.certified]
    parts = []
    backfilled = [each for each in own if each.mode.skipped_kv == "backfill"]
    propagated = [each for each in own if each.mode.skipped_kv == "propagate"]
    if backfilled:
        best = max(backfilled, key=net_saving)
        parts.append(
            f"Backfilled, up to {share(best.passes_saved.value)} of the passes need not be waited for, and exits "
            f"themselves compute {share(-best.compute_saved.value)} of full depth."
        )
    if propagated:
        most = max(each.compute_saved.value for each in propagated)
        parts.append(
            f"Propagated, up to {share(most)} of the compute is saved."
            if most > 0
            else "Propagated, with what gates and projections compute themselves none of them saves compute on this "
            "model."
        )
    return " ".join(parts), not own or any(net_saving(each) > 0 for each in own)


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
        result = result_of(content.table, variant) if each.exits is None else each.exits
        exits = "verified" if each.exits is None else promised(each.exits.mode)
        way = "" if each.exits is None else skipped_name(each.exits.mode.skipped_kv)
        rows.append(
            [
                Cell(each.use, strong=True),
                Cell(variant_name(variant)),
                Cell(exits, way),
                Cell(plain(None if result is None else result.perplexity.value)),
                measured(each.cost.relative, "{:+.1f} %", each.cost.tone, 100.0),
                measured(each.cost.kl, "{:.3f}"),
                Cell(share(None if each.exits is None else each.exits.passes_saved.value)),
                Cell(share(None if each.exits is None else each.exits.compute_saved.value)),
            ]
        )
    headers = (
        "what to use",
        "savings",
        "exits",
        "perplexity",
        "change",
        "KL",
        "passes saved by exits",
        "compute saved by exits",
    )
    return Table(headers, rows, words=3)
