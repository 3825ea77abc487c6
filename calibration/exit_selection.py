"""Which of the exits that were fitted the bundle keeps, and what for, from the gates' view of the select split."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from exeunt.calibration.drafting_choice import DraftChoice, PassCosts, choose_drafting
from exeunt.calibration.exit_choice import ExitCosts, choose_exits, exit_sets
from exeunt.calibration.exit_costs import measure_exit_costs, measure_pass_costs
from exeunt.calibration.exit_fit import ExitData, FittedExit
from exeunt.calibration.options import CalibrationOptions, drafting_blocks, exit_blocks
from exeunt.calibration.progress import ProgressReport
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.calibration.thresholds import GateView, ThresholdPlan, plan_thresholds, view_gates

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

    `costs` are None where nothing was decided by them.
    """

    certified: tuple[FittedExit, ...]
    plan: ThresholdPlan
    drafting: Drafting | None = None
    costs: ExitCosts | None = None

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
) -> ExitSelection:
    """Choose among the `fitted` exits, all of which `model` has. `rows` are the select split's."""
    if not fitted:  # a model of one block has none
        return ExitSelection((), NO_THRESHOLDS)
    states = [data.select(head.block) for head in model.exits]
    with progress.phase("Asking the gates", sum(each.tokens for each in states)) as advance:
        view = view_gates(model.exits, states, rows, model.decoder.project_exit, advance)
    spec = model.decoder.spec
    certified, costs = _among(fitted, exit_blocks(spec, options.exits)), None
    if options.exits == "auto":
        costs = measure_exit_costs(model)
        certified = _certified(view, fitted, certified, spec.blocks, costs, certify_tokens, options, progress)
    plan = plan_thresholds(view.only(certified), options.targets, certify_tokens, options.confidence)
    candidates = _among(fitted, drafting_blocks(spec, options.exits, options.drafting_exit))
    drafting = _drafting(model, view, fitted, candidates, progress) if candidates else None
    return ExitSelection(tuple(fitted[place] for place in certified), plan, drafting, costs)


def _among(fitted: Sequence[FittedExit], blocks: Sequence[int]) -> tuple[int, ...]:
    """The places of the exits that follow `blocks`."""
    return tuple(place for place, each in enumerate(fitted) if each.head.block in blocks)


def _certified(
    view: GateView,
    fitted: Sequence[FittedExit],
    candidates: tuple[int, ...],
    blocks: int,
    costs: ExitCosts,
    certify_tokens: int,
    options: CalibrationOptions,
    progress: ProgressReport,
) -> tuple[int, ...]:
    """The places of the exits that save most, of those at `candidates`."""
    depths = [fitted[place].head.depth for place in candidates]
    with progress.phase("Choosing exits", len(exit_sets(len(depths)))) as advance:
        choice = choose_exits(
            view.only(candidates),
            depths,
            blocks,
            costs,
            options.targets,
            certify_tokens,
            options.confidence,
            advance,
        )
    kept = tuple(candidates[place] for place in choice.kept)
    progress.note(
        f"in units of a block a gate costs {costs.gate:.2f}, a projection {costs.projection:.2f}, the keys and values "
        f"of a skipped block {costs.skipped_kv:.2f}"
    )
    progress.note(
        f"exits kept to be certified: {', '.join(fitted[place].head.name for place in kept)}, expected to save "
        f"{choice.saving:.1%} of the blocks, net"
    )
    return kept


def _drafting(
    model: ForcedModel,
    view: GateView,
    fitted: Sequence[FittedExit],
    candidates: tuple[int, ...],
    progress: ProgressReport,
) -> Drafting:
    exits = tuple(fitted[place] for place in candidates)
    depths = [each.head.depth for each in exits]
    costs = measure_pass_costs(model, depths)
    choice = choose_drafting(view.only(candidates), depths, costs)
    plan, chosen = choice.plan, exits[choice.place]
    progress.note(
        f"drafting exit: {chosen.head.name}, up to {plan.length} in a row; its gate lets it draft "
        f"{plan.rates.drafted:.0%} of the tokens, {plan.rates.acceptance:.0%} of them rightly; one stream is expected "
        f"to run at {plan.speed:.2f} of its speed without drafts"
    )
    return Drafting(chosen, exits, choice, costs)
