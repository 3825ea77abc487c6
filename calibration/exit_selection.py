"""Which of the exits that were fitted the bundle keeps, and what for, from the gates' view of the select split."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from exeunt.calibration.drafting_choice import DraftChoice, PassCosts, choose_drafting
from exeunt.calibration.exit_choice import ExitChoice, ExitCosts, choose_exits, exit_sets
from exeunt.calibration.exit_costs import measure_exit_costs, measure_pass_costs
from exeunt.calibration.exit_fit import ExitData
from exeunt.calibration.exit_records import FittedExit
from exeunt.calibration.nll_planning import plan_nll, select_losses
from exeunt.calibration.options import CalibrationOptions
from exeunt.calibration.progress import ProgressReport
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.calibration.thresholds import (
    GateShares,
    GateView,
    NllPlan,
    ThresholdPlan,
    plan_thresholds,
    view_gates,
)

NO_THRESHOLDS = ThresholdPlan((), {}, 0.0)


@dataclass(frozen=True, slots=True)
class Drafting:
    """The exit that drafts, and how the candidates for it compare."""

    exit: FittedExit
    candidates: tuple[FittedExit, ...]
    choice: DraftChoice  # its places are those of `candidates`
    costs: PassCosts


@dataclass(frozen=True, slots=True)
class ExitSelection:
    """The exits kept: those to be certified, together, at the plan's thresholds, and the one that drafts.

    `costs` and `choice` are None where nothing was decided by them: where the exits were named.
    """

    certified: tuple[FittedExit, ...]
    plan: ThresholdPlan
    drafting: Drafting | None = None
    costs: ExitCosts | None = None
    choice: ExitChoice | None = None  # its places are those of `candidates`
    candidates: tuple[FittedExit, ...] = ()
    shares: tuple[
        GateShares, ...
    ] = ()  # what the certified exits' gates do at the plan's thresholds, select split

    @property
    def kept(self) -> tuple[FittedExit, ...]:
        """Every exit of the bundle, shallowest first."""
        extra = [] if self.drafting is None or self.drafting.exit in self.certified else [self.drafting.exit]
        return tuple(sorted((*self.certified, *extra), key=lambda each: each.head.block))


def select_exits(
    model: ForcedModel,
    fitted: Sequence[FittedExit],
    data: ExitData,
    rows: Sequence[Tensor],
    certify_tokens: int,
    options: CalibrationOptions,
    progress: ProgressReport,
    costs: ExitCosts | None = None,
    passes: PassCosts | None = None,
    documents: Sequence[int] | None = None,
) -> ExitSelection:
    """Choose among the `fitted` exits, all of which `model` has. `rows` are the select split's, of these `documents`.

    Where exits are chosen all are candidates, where they are named those named. Costs that are not given are measured.
    """
    if not fitted:  # a model of one block has none
        return ExitSelection((), NO_THRESHOLDS)
    states = [data.select(head.block) for head in model.exits]
    with progress.phase("Asking the gates", sum(each.tokens for each in states)) as advance:
        view = view_gates(model.exits, states, rows, model.decoder.project_exit, advance, documents=documents)
    certified, choice = _among(fitted, options.exits), None
    candidates = certified
    size = None if fitted[0].head.shortlist is None else len(fitted[0].head.shortlist)
    if options.exits == "auto":
        costs = (costs or measure_exit_costs(model)).with_shortlist(size)
        choice = _choice(view, fitted, model.blocks, costs, certify_tokens, options, progress)
        certified = choice.kept
    plan = NO_THRESHOLDS  # of exits that draft alone there is nothing to certify
    if certified:
        plan = plan_thresholds(view.only(certified), options.targets, certify_tokens, options.confidence)
    if options.nll_targets and certified:
        nll = _nll_plan(model, view, certified, data, rows, plan, certify_tokens, options)
        plan = replace(plan, nll=nll)
    drafts = _among(fitted, _drafting_blocks(options))
    drafting = _drafting(model, view, fitted, drafts, passes, progress, size) if drafts else None
    return ExitSelection(
        tuple(fitted[place] for place in certified),
        plan,
        drafting,
        None if choice is None else costs,
        choice,
        tuple(fitted[place] for place in candidates),
        tuple(view.only(certified).shares(threshold) for threshold in plan.thresholds),
    )


def _nll_plan(
    model: ForcedModel,
    view: GateView,
    certified: Sequence[int],
    data: ExitData,
    rows: Sequence[Tensor],
    plan: ThresholdPlan,
    certify_tokens: int,
    options: CalibrationOptions,
) -> NllPlan | None:
    """What to test for the NLL increase of the exits at the places `certified`."""
    exits, own = [model.exits[place] for place in certified], view.only(certified)
    states, final = [data.select(head.block) for head in exits], data.final[data.fit_tokens :]
    losses = select_losses(model, exits, states, final, rows, own)
    beside = plan.thresholds if len(exits) > 1 else ()  # behind a single exit disagreement takes no passes
    return plan_nll(
        own,
        losses,
        options.nll_targets,
        certify_tokens,
        options.confidence,
        beside,
        options.nll_effort.every,
    )


def _drafting_blocks(options: CalibrationOptions) -> Literal["auto"] | tuple[int, ...]:
    if options.drafting_exit == "auto":
        return "auto"
    return () if options.drafting_exit == "none" else (options.drafting_exit,)


def _among(fitted: Sequence[FittedExit], blocks: Literal["auto"] | tuple[int, ...]) -> tuple[int, ...]:
    """The places of the exits that follow `blocks`."""
    return tuple(place for place, each in enumerate(fitted) if blocks == "auto" or each.head.block in blocks)


def _choice(
    view: GateView,
    fitted: Sequence[FittedExit],
    blocks: int,
    costs: ExitCosts,
    certify_tokens: int,
    options: CalibrationOptions,
    progress: ProgressReport,
) -> ExitChoice:
    """The exits that save most."""
    depths = [each.head.depth for each in fitted]
    with progress.phase("Choosing exits", len(exit_sets(len(depths)))) as advance:
        choice = choose_exits(
            view, depths, blocks, costs, options.targets, certify_tokens, options.confidence, advance
        )
    progress.note(
        f"in units of a block a gate costs {costs.gate:.2f}, a look in vain {costs.projection:.2f}, a confirmation in "
        f"vain {costs.whole:.2f}, keys and values of a skipped block {costs.skipped_kv:.2f}"
    )
    progress.note(
        f"exits kept to be certified: {', '.join(fitted[place].head.name for place in choice.kept)}, expected to save "
        f"{choice.saving:.1%} of the blocks, net"
    )
    return choice


def _drafting(
    model: ForcedModel,
    view: GateView,
    fitted: Sequence[FittedExit],
    candidates: tuple[int, ...],
    costs: PassCosts | None,
    progress: ProgressReport,
    shortlist: int | None = None,
) -> Drafting:
    exits = tuple(fitted[place] for place in candidates)
    depths = [each.head.depth for each in exits]
    costs = (costs or measure_pass_costs(model, depths)).with_shortlist(shortlist)
    choice = choose_drafting(view.only(candidates), depths, costs)
    plan, chosen = choice.plan, exits[choice.place]
    progress.note(
        f"drafting exit: {chosen.head.name}, up to {plan.length} in a row; its gate lets it draft "
        f"{plan.rates.drafted:.0%} of the tokens, {plan.rates.acceptance:.0%} of them rightly; one stream is expected "
        f"to run at {plan.speed:.2f} of its speed without drafts"
    )
    return Drafting(chosen, exits, choice, costs)
