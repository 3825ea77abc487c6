"""What the held-out split says of what was learned: certificates, every mode's figures, and what modes write."""

from collections.abc import Sequence
from dataclasses import dataclass

from exeunt.calibration.bundle_manifest import data_name
from exeunt.calibration.certificates import (
    CertifiedVariant,
    certify_variants,
    certify_work,
    nll_risk_table,
)
from exeunt.calibration.evaluation import EvaluationTable, evaluate_modes
from exeunt.calibration.generation import Written, generate_modes
from exeunt.calibration.learning import Learned
from exeunt.calibration.modes import modes_of, plan_modes
from exeunt.calibration.risk import percent
from exeunt.calibration.scored_text import ScoredText
from exeunt.calibration.sequence_batch import first_rows
from exeunt.calibration.task import Task
from exeunt.compression.manifest import NllRiskEntry, RiskEntry


@dataclass(frozen=True, slots=True)
class Judged:
    """What was found on text that nothing was fitted or chosen on."""

    certified: tuple[CertifiedVariant, ...]
    table: EvaluationTable
    written: tuple[Written, ...]


def judge(task: Task, learned: Learned) -> Judged:
    """Certify thresholds, evaluate every mode, and let some of them write."""
    certified = _certify(task, learned)
    risk_table = [each.entry(task.options.confidence) for each in certified]
    nll_table = nll_risk_table(certified, task.options.confidence)
    table = _evaluate(task, learned, risk_table, nll_table)
    return Judged(certified, table, _generate(task, learned, risk_table))


def _certify(task: Task, learned: Learned) -> tuple[CertifiedVariant, ...]:
    heads, plan = [each.head for each in learned.selection.certified], learned.selection.plan
    if not heads:
        return ()
    splits, stack = task.splits, learned.stack
    with task.progress.phase(
        "Certifying thresholds", certify_work(stack, heads, splits.certify, plan, task.options.nll_effort)
    ) as advance:
        certified = certify_variants(
            stack,
            heads,
            splits.certify,
            plan,
            batch_tokens=task.options.batch_tokens,
            confidence=task.options.confidence,
            advance=advance,
            documents=splits.documents.get("certify"),
            effort=task.options.nll_effort,
            journal=task.journal,
        )
    for each in certified:
        found = [c for c in each.certification.certificates if c.certified]
        shown = ", ".join(
            f"{percent(c.target)} at {c.threshold:.3f} ({c.exits / c.tokens:.1%} leave)" for c in found
        )
        task.progress.note(f"{each.variant}, {each.skipped_kv}: {shown or 'no exits certified'}{_nll(each)}")
    nothing = not any(_nll(each) for each in certified)
    if nothing and not any(c.certified for each in certified for c in each.certification.certificates):
        task.progress.note(_uncertified(certified, splits.tokens()["certify"]))
    return certified


def _nll(each: CertifiedVariant) -> str:
    """The certified targets of the other risk, to stand behind those of the first."""
    found = () if each.nll is None else each.nll.certificates
    shown = ", ".join(
        f"{c.target:g} nats at {c.threshold:.3f} ({c.exits / c.tokens:.1%} leave)"
        for c in found
        if c.threshold is not None
    )
    return f"; {shown}" if shown else ""


def _uncertified(outcomes: Sequence[CertifiedVariant], tokens: int) -> str:
    """That nothing is certified, why, and what helps. `tokens` are those of the certify split."""
    of_targets = [target for each in outcomes for target in each.certification.certificates]
    most = max(of_targets, key=lambda target: target.target)  # the loosest: what it fell short of is least
    return (
        f"No target is certified for any variant, so no request may ask for one ({percent(most.target)}, the loosest: "
        f"{most.reason}); the certify split had {tokens:,} tokens: give more text or more --tokens."
    )


def _evaluate(
    task: Task, learned: Learned, risk_table: Sequence[RiskEntry], nll_table: Sequence[NllRiskEntry]
) -> EvaluationTable:
    options, stack, splits = task.options, learned.stack, task.splits
    heads = [each.head for each in learned.selection.certified]
    models = {variant: stack.forced(variant, heads) for variant in (*stack.variants, stack.reference)}
    rows = first_rows(splits.certify, options.evaluation_tokens)
    documents = splits.documents.get("certify")
    text = ScoredText.of_rows(rows, None if documents is None else documents[: len(rows)])
    plan = plan_modes(
        models,
        stack.variants,
        stack.reference,
        stack.deployed,
        risk_table,
        first_rows(
            splits.select, options.batch_tokens
        ),  # thresholds that nothing certifies are chosen elsewhere
        task.progress,
        batch_tokens=options.batch_tokens,
        nll_table=nll_table,
    )
    work = (len(plan.modes) + len(plan.sweep)) * text.read
    with task.progress.phase("Evaluating every mode", work) as advance:
        return evaluate_modes(
            plan.modes,
            models,
            text,
            text=f"{data_name(options.data)}, certify split",
            batch_tokens=stack.batch_tokens(stack.reference.weights, options.batch_tokens),
            seed=options.seed,
            sweep=plan.sweep,
            journal=task.journal,
            advance=advance,
        )


def _generate(task: Task, learned: Learned, risk_table: Sequence[RiskEntry]) -> tuple[Written, ...]:
    """What the reference and the deployed variant write, exits off and at each certified target of disagreement."""
    size = task.options.studies.generation
    if size is None:
        return ()
    stack, rows = learned.stack, task.splits.certify
    heads = [each.head for each in learned.selection.certified]
    wanted = tuple(dict.fromkeys((stack.reference, stack.deployed)))
    models = {variant: stack.forced(variant, heads) for variant in wanted}
    own = [entry for entry in risk_table if entry.variant == stack.deployed]
    modes = [
        mode
        for mode in modes_of(wanted, stack.reference, stack.deployed, own, {})
        if not models[
            mode.variant
        ].decoder.streamed  # who writes a token at a time would read the model as often
    ]
    size = size.fitted(rows, task.spec.max_position_embeddings)
    temperatures = task.options.studies.temperatures
    with task.progress.phase("Letting modes write", size.tokens * len(modes) * len(temperatures)) as advance:
        return generate_modes(
            modes,
            models,
            models[stack.reference],
            rows,
            size,
            task.tokenizer.decode,
            seed=task.options.seed,
            temperatures=temperatures,
            advance=advance,
        )
