"""Certificates of every combination, as the manifest holds them and as the report explains them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeVar

from torch import Tensor

from exeunt.calibration.certification import (
    Certification,
    Front,
    FullDepthPass,
    NllCertification,
    certify_backfilled,
    certify_both_propagated,
    certify_nll_backfilled,
    full_depth_pass,
)
from exeunt.calibration.certification_record import packed, unpacked
from exeunt.calibration.journal import Journal, NoJournal
from exeunt.calibration.model_stack import ModelStack
from exeunt.calibration.nll_risk import CLIP, NllCertificate, untested
from exeunt.calibration.risk import Certificate
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.calibration.text_units import text_units
from exeunt.calibration.thresholds import Steps, ThresholdPlan
from exeunt.compression.exits import ExitHead
from exeunt.compression.manifest import NllRiskEntry, NllRiskTarget, RiskEntry, RiskTarget
from exeunt.compression.variant import SkippedKV, Variant

SKIPPED: Final[tuple[SkippedKV, ...]] = ("backfill", "propagate")
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class NllEffort:
    """How much the NLL increase with propagated keys and values is worth: each threshold is a pass to the end there.

    `variants` says which are tested, `every` that a pass reads each so many-th batch of their rows.
    """

    variants: Literal["none", "deployed", "all"] = "deployed"
    every: int = 2


@dataclass(frozen=True, slots=True)
class CertifiedVariant:
    """The outcome for one combination: a variant, and what becomes of skipped keys and values.

    `certification` is of disagreement, `nll` of the mean NLL increase, None where it has no targets. `text_blocks` are
    the independent blocks of text behind both (`text_units`).
    """

    variant: Variant
    skipped_kv: SkippedKV
    certification: Certification
    nll: NllCertification | None = None
    text_blocks: int = 0

    def entry(self, confidence: float) -> RiskEntry:
        """The line of the risk table."""
        return RiskEntry(
            weights=self.variant.weights,
            kv_cache=self.variant.kv_cache,
            linear_block=self.variant.linear_block,
            skipped_kv=self.skipped_kv,
            targets=tuple(_target(certificate) for certificate in self.certification.certificates),
            confidence=confidence,
            text_blocks=self.text_blocks,
        )

    def nll_entry(self, confidence: float) -> NllRiskEntry | None:
        """The line of the NLL risk table; None where it has no targets."""
        if self.nll is None or not self.nll.certificates:
            return None
        return NllRiskEntry(
            weights=self.variant.weights,
            kv_cache=self.variant.kv_cache,
            linear_block=self.variant.linear_block,
            skipped_kv=self.skipped_kv,
            targets=tuple(_nll_target(certificate) for certificate in self.nll.certificates),
            clip=CLIP,
            confidence=confidence,
            text_blocks=max((int((counts.tokens > 0).sum()) for _, counts in self.nll.tested), default=0),
        )


def nll_risk_table(certified: Sequence[CertifiedVariant], confidence: float) -> tuple[NllRiskEntry, ...]:
    """The NLL risk table of a bundle."""
    entries = (each.nll_entry(confidence) for each in certified)
    return tuple(entry for entry in entries if entry is not None)


def certify_variants(
    stack: ModelStack,
    exits: Sequence[ExitHead],
    rows: Sequence[Tensor],
    plan: ThresholdPlan,
    *,
    batch_tokens: int,
    confidence: float,
    advance: Callable[[int], None],
    documents: Sequence[int] | None = None,
    effort: NllEffort = NllEffort(),
    journal: Journal | None = None,
) -> tuple[CertifiedVariant, ...]:
    """Certify every variant of `stack` on the held-out `rows`, backfilled and propagated, all with the same plan.

    The deployed variant has all rows, the others every second one: there are seven of them. `documents` numbers the
    document that each row was cut from: blocks of text are made by it. `effort` limits the NLL increase where it takes
    passes of its own. Variants that `journal` knows are not certified again.
    `advance` is told the tokens of every pass, at most `certify_work` in all.
    """
    journal = journal or NoJournal()
    outcomes: dict[Variant, list[CertifiedVariant]] = {}
    # By place: what the last variant without the linear block leaves to its twin with it.
    fronts: dict[int, Front] = {}
    for variant in _twins_together(stack.variants):
        places = rows_for(variant, stack, range(len(rows)))
        fork = None if stack.linear_block is None or variant.linear_block else stack.linear_block.index
        known = [fronts[place] for place in places] if variant.linear_block and fronts else None
        fronts = {}
        own = [rows[place] for place in places]
        numbers = None if documents is None else [documents[place] for place in places]
        steps = _propagated_steps(plan, variant, stack, effort)
        under = _circumstances(exits, plan, steps, effort, own, numbers, confidence)
        name = (
            f"certified-{variant.weights}-{variant.kv_cache}-{'linear' if variant.linear_block else 'whole'}"
        )
        found = unpacked(journal.read(name), under)
        if found is None:
            model = stack.forced(variant, exits)
            full_depth = full_depth_pass(
                model,
                own,
                plan.least,
                batch_tokens=stack.batch_tokens(variant.weights, batch_tokens),
                documents=numbers,
                losses=plan.nll is not None,
                fork=fork,
                fronts=known,
                advance=advance,
            )
            fronts = dict(zip(places, full_depth.fronts, strict=True)) if fork is not None else {}
            found = _both_methods(
                model,
                full_depth,
                plan,
                steps,
                effort,
                _untested_reason(effort, variant, stack.deployed),
                confidence=confidence,
                advance=advance,
            )
            journal.write(name, *packed(found, under))
        else:
            advance(sum(map(len, own)) * _passes(exits, plan, steps))
        blocks = text_units(own, numbers).count
        outcomes[variant] = [
            CertifiedVariant(variant, method, certification, nll, blocks)
            for method, (certification, nll) in zip(SKIPPED, found, strict=True)
        ]
    return tuple(each for variant in stack.variants for each in outcomes[variant])


def _twins_together(variants: Sequence[Variant]) -> list[Variant]:
    """`variants`, each with the linear block right behind the one without, with which it shares the blocks up to it."""
    plain = [variant for variant in variants if not variant.linear_block]
    twins = ((variant, replace(variant, linear_block=True)) for variant in plain)
    return [variant for pair in twins for variant in pair if variant in variants]


def certify_work(
    stack: ModelStack,
    exits: Sequence[ExitHead],
    rows: Sequence[Tensor],
    plan: ThresholdPlan,
    effort: NllEffort = NllEffort(),
) -> int:
    """The most tokens that the passes of `certify_variants` read, together."""
    return sum(
        sum(map(len, rows_for(variant, stack, rows)))
        * _passes(exits, plan, _propagated_steps(plan, variant, stack, effort))
        for variant in stack.variants
    )


def rows_for(variant: Variant, stack: ModelStack, rows: Sequence[Row]) -> Sequence[Row]:
    """The rows that `variant` is certified on."""
    return rows if variant == stack.deployed else rows[::2]


def _passes(exits: Sequence[ExitHead], plan: ThresholdPlan, steps: Steps | None) -> int:
    tested = {*(plan.thresholds if len(exits) > 1 else ()), *(() if steps is None else steps.thresholds)}
    return 1 + len(tested)


def _propagated_steps(
    plan: ThresholdPlan, variant: Variant, stack: ModelStack, effort: NllEffort
) -> Steps | None:
    """What to test of the NLL increase with propagated keys and values; None where nothing is."""
    tested = effort.variants == "all" or (effort.variants == "deployed" and variant == stack.deployed)
    return plan.nll.propagate if plan.nll is not None and tested else None


def _both_methods(
    model: ForcedModel,
    full_depth: FullDepthPass,
    plan: ThresholdPlan,
    steps: Steps | None,
    effort: NllEffort,
    untested_reason: str,
    *,
    confidence: float,
    advance: Callable[[int], None],
) -> list[tuple[Certification, NllCertification | None]]:
    """The outcomes with backfill and with propagate.

    What is skipped lies behind a single exit: there it decides nothing about who leaves, and disagreement is the same.
    `untested_reason` is why the NLL increase with propagate is not tested, where `steps` are None.
    """
    backfilled = certify_backfilled(full_depth, plan, confidence=confidence)
    several = len(model.exits) > 1
    propagated, increase = certify_both_propagated(
        model,
        full_depth,
        plan if several else None,
        steps,
        every=effort.every,
        confidence=confidence,
        advance=advance,
    )
    nll: list[NllCertification | None] = [None, None]
    if plan.nll is not None:
        nll[0] = certify_nll_backfilled(full_depth, plan.nll.backfill, confidence=confidence)
        nll[1] = increase if steps is not None else _not_tested(plan.nll.propagate, untested_reason)
    return [(backfilled, nll[0]), (propagated if several else backfilled, nll[1])]


def _not_tested(steps: Steps, reason: str) -> NllCertification:
    return NllCertification(tuple(untested(target, reason) for target in steps.begins), ())


def _untested_reason(effort: NllEffort, variant: Variant, deployed: Variant) -> str:
    """Why `effort` leaves out the NLL increase with propagated keys and values, and what would test it for `variant`.

    Users read it, in the report and in the server's answers, behind the target and the way with skipped keys and values
    that it is about.
    """
    if effort.variants == "none":
        preset = "default" if variant == deployed else "thorough"
        return f"the bundle's preset does not test it, calibrate with --preset {preset}"
    tested = _in_words(deployed)
    if variant.linear_block and not deployed.linear_block:
        tested += " without the linear block"
    return f"it was tested only for {tested}, ask for that or calibrate with --preset thorough"


def _in_words(variant: Variant) -> str:
    weights, keys = ({"int4": "INT4", "full": "full"}[form] for form in (variant.weights, variant.kv_cache))
    return f"{weights} weights with {keys} keys and values" + (
        " and the linear block" if variant.linear_block else ""
    )


def _circumstances(
    exits: Sequence[ExitHead],
    plan: ThresholdPlan,
    steps: Steps | None,
    effort: NllEffort,
    rows: Sequence[Tensor],
    documents: Sequence[int] | None,
    confidence: float,
) -> dict[str, Any]:
    """What an outcome depends on beside the model, as JSON values: another calibration may have chosen otherwise."""
    tested = [] if plan.nll is None else [plan.nll.backfill, *(() if steps is None else (steps,))]
    return {
        "exits": [head.name for head in exits],
        "thresholds": list(plan.thresholds),
        "begins": [list(each) for each in plan.begins.items()],
        "correlation": plan.correlation,
        "nll": [[list(each.thresholds), [list(begin) for begin in each.begins.items()]] for each in tested],
        "every": effort.every,
        "rows": [len(row) for row in rows],
        "documents": None if documents is None else list(documents),
        "confidence": confidence,
    }


def _target(certificate: Certificate) -> RiskTarget:
    seen = certificate.tokens > 0
    return RiskTarget(
        target=certificate.target,
        certified=certificate.certified,
        threshold=certificate.threshold,
        exit_rate=certificate.exits / certificate.tokens if seen else None,
        disagreement=certificate.disagreement,
        upper_bound=certificate.upper_bound,
        tokens=certificate.exits,
        reason=certificate.reason,
    )


def _nll_target(certificate: NllCertificate) -> NllRiskTarget:
    unclipped = certificate.unclipped
    return NllRiskTarget(
        target=certificate.target,
        certified=certificate.certified,
        threshold=certificate.threshold,
        exit_rate=certificate.exits / certificate.tokens if certificate.tokens else None,
        increase=certificate.increase,
        upper_bound=certificate.upper_bound,
        unclipped=None if unclipped is None else unclipped.value,
        unclipped_low=None if unclipped is None else unclipped.low,
        unclipped_high=None if unclipped is None else unclipped.high,
        perplexity=certificate.perplexity,
        full_perplexity=certificate.full_perplexity,
        tokens=certificate.tokens,
        reason=certificate.reason,
    )
