"""What the fit and select splits teach: INT4 weights, the linear block, exits; everything that is fitted or chosen.

The splits pass the model once, block by block (`streaming_pass`): a block is quantised and then run as it will be
deployed, while visitors keep the states behind it and fit a linear map to it. What follows works on what they kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from exeunt.calibration.activations import BlockVisitor, StateKeeper
from exeunt.calibration.block_choice import BlockChoice, choice_work, choose_block
from exeunt.calibration.block_fitter import BlockFitter
from exeunt.calibration.block_runner import BlockRunner
from exeunt.calibration.drafting_choice import PassCosts
from exeunt.calibration.exit_choice import ExitCosts
from exeunt.calibration.exit_costs import measure_exit_costs, measure_pass_costs
from exeunt.calibration.exit_fit import ExitData, fit_exits, top_tokens
from exeunt.calibration.exit_placement import is_screened, place_exits, state_blocks, untrained_exit
from exeunt.calibration.exit_records import FittedExit
from exeunt.calibration.exit_screen import ExitScreen
from exeunt.calibration.exit_selection import ExitSelection, select_exits
from exeunt.calibration.model_stack import ModelStack, final_exit_norm
from exeunt.calibration.options import wanted_linear_block
from exeunt.calibration.rank_sweep import RankSweep, sweep_of
from exeunt.calibration.replacement import Losses, walk_work
from exeunt.calibration.sequence_batch import first_rows
from exeunt.calibration.shortlist_choice import shortlist_sizes
from exeunt.calibration.streaming_pass import planned_tokens, stream_model
from exeunt.calibration.task import Task
from exeunt.calibration.weights_int4 import Int4Weights
from exeunt.compression.exits import ExitNorm


@dataclass(frozen=True, slots=True)
class Learned:
    """What the fit and select splits gave. The stack has the linear block in it, where one was chosen."""

    int4: Int4Weights | None
    stack: ModelStack
    choice: BlockChoice | None
    ranks: RankSweep | None
    screen: ExitScreen | None
    exits: tuple[FittedExit, ...]
    selection: ExitSelection


@dataclass(frozen=True, slots=True)
class _Costs:
    """Times measured on this machine: of leaving early, and of drafts."""

    exits: ExitCosts
    passes: PassCosts


def learn(task: Task) -> Learned:
    """Everything that is fitted or chosen."""
    options, spec, splits = task.options, task.spec, task.splits
    rows = (*splits.fit, *splits.select)
    fit_tokens, tokens = splits.tokens()["fit"], sum(map(len, rows))
    keeper = StateKeeper(
        state_blocks(spec, options.exits, options.drafting_exit, tokens, task.dtype.itemsize),
        tokens,
        spec.hidden_size,
        task.dtype,
        task.scratch,
    )
    fitter = BlockFitter(spec.hidden_size, spec.block_parameters, fit_tokens, task.device, task.scratch)
    visitors: list[BlockVisitor] = [keeper] if options.linear_block == "none" else [keeper, fitter]
    int4, final = _stream(task, rows, visitors)
    with task.progress.phase("Loading the model", 1 if int4 is None else 2) as advance:
        stack = ModelStack.build(
            task.checkpoint,
            int4,
            options.kv_cache,
            task.device,
            task.dtype,
            advance,
            int4_alone=options.weights == "int4",
            streamed=options.stream_weights,
        )
    choice, ranks = (None, None) if options.linear_block == "none" else _linear_block(task, stack, fitter)
    model = stack.forced(stack.deployed, ())
    with task.progress.phase("Asking the full model", tokens) as advance:
        top = top_tokens(model, final, advance)
    screen, exits, selection = _exits(task, stack, ExitData(keeper.states, final, top, fit_tokens))
    chosen = None if choice is None or choice.chosen is None else choice.chosen.map
    return Learned(int4, stack.with_linear_block(chosen), choice, ranks, screen, exits, selection)


def _stream(
    task: Task, rows: Sequence[Tensor], visitors: Sequence[BlockVisitor]
) -> tuple[Int4Weights | None, Tensor]:
    """The one pass through the model: its INT4 weights, and the states behind the last block."""
    plan, fit_rows = task.int4_plan, len(task.splits.fit)
    runner = BlockRunner(task.spec, task.options.kv_cache, task.device, task.dtype)
    title = "Collecting activations" if plan is None else "Quantising weights, collecting activations"
    with task.progress.phase(title, planned_tokens(rows, fit_rows, plan, task.spec.blocks)) as advance:
        passed = stream_model(
            task.checkpoint.weights(),
            runner,
            rows,
            fit_rows,
            plan,
            visitors,
            task.scratch,
            task.journal,
            batch_tokens=task.options.batch_tokens,
            advance=advance,
        )
    return passed.int4, passed.final


def _linear_block(task: Task, stack: ModelStack, fitter: BlockFitter) -> tuple[BlockChoice, RankSweep | None]:
    options, spec = task.options, task.spec
    rows = first_rows(task.splits.select, options.block_tokens)
    documents = task.splits.documents.get("select")
    wanted = wanted_linear_block(spec, options.linear_block)
    model = stack.forced(stack.deployed, ())
    work = choice_work(rows, spec.blocks, wanted, options.block_candidates)
    with task.progress.phase("Comparing linear blocks", work) as advance:
        choice, losses = choose_block(
            model,
            fitter.fits,
            rows,
            wanted,
            candidates=options.block_candidates,
            batch_tokens=options.batch_tokens,
            seed=options.seed,
            documents=None if documents is None else documents[: len(rows)],
            advance=advance,
        )
    if choice.chosen is not None and choice.cost is not None:
        task.progress.note(
            f"linear block {choice.chosen.block}, rank {choice.chosen.map.rank}: R² {choice.chosen.r2_cut:.3f}, "
            f"perplexity {choice.cost.increase.value:+.2f}"
        )
    return choice, _ranks(task, stack, fitter, choice, losses, rows)


def _ranks(
    task: Task,
    stack: ModelStack,
    fitter: BlockFitter,
    choice: BlockChoice,
    losses: Losses,
    rows: Sequence[Tensor],
) -> RankSweep | None:
    """What the chosen block costs in other sizes."""
    if choice.chosen is None or not task.options.studies.ranks:
        return None
    fit = next(each for each in fitter.ranked if each.block == choice.chosen.block)
    with task.progress.phase("Trying other sizes of it", walk_work(rows, task.spec.blocks)) as advance:
        return sweep_of(
            stack.forced(stack.deployed, ()),
            losses,
            fit,
            rows,
            batch_tokens=task.options.batch_tokens,
            seed=task.options.seed,
            advance=advance,
        )


def _exits(
    task: Task, stack: ModelStack, data: ExitData
) -> tuple[ExitScreen | None, tuple[FittedExit, ...], ExitSelection]:
    """Which blocks were looked at, the exits that were trained, and those that are kept."""
    options, splits = task.options, task.splits
    norm = final_exit_norm(task.checkpoint, task.device)
    model = stack.forced(stack.deployed, ())
    costs = _costs(task, stack, norm) if data.states else None
    screen = None
    if costs is not None and is_screened(options.exits, options.drafting_exit):
        screen = place_exits(
            model,
            norm,
            data,
            splits.select,
            options.exits,
            options.drafting_exit,
            costs.exits.listed,
            costs.passes.listed,
            options.targets,
            options.screen,
            task.progress,
        )
        data = data.only(screen.trained)
    compared = sorted(data.states)[-options.studies.losses :] if options.studies.losses else ()
    exits = fit_exits(
        model,
        norm,
        data,
        options.head,
        options.probe,
        options.seed,
        task.progress,
        stack.full,
        compared=sorted(data.states) if options.studies.losses is None else compared,
        risks=options.targets,
        journal=task.journal,
        costs=None if costs is None else costs.exits,
    )
    for each in exits:
        task.progress.note(
            f"{each.head.name}: agreement {each.training.untrained_agreement:.1%} untrained, "
            f"{each.training.agreement:.1%} trained, AUC {each.gate.auc:.3f}"
        )
    selection = select_exits(
        stack.forced(stack.deployed, [each.head for each in exits]),
        exits,
        data,
        splits.select,
        splits.tokens()["certify"],
        options,
        task.progress,
        None if costs is None else costs.exits,
        None if costs is None else costs.passes,
        splits.documents.get("select"),
    )
    return screen, exits, selection


def _costs(task: Task, stack: ModelStack, norm: ExitNorm) -> _Costs:
    """The times that decide what pays, of exits as large as trained ones, behind every block."""
    spec, deployed = task.spec, stack.deployed
    model = stack.forced(deployed, [untrained_exit(norm, spec.blocks // 2, task.options.probe.units)])
    about = [repr(spec), str(deployed), str(task.dtype), str(task.device), str(task.options.group_size)]
    about += [f"looks at {shortlist_sizes(spec.vocab_size)}", f"{task.options.probe.units} units"]
    depths = tuple(range(1, spec.blocks))
    exits = task.measurements.of("exits", about, ExitCosts, lambda: measure_exit_costs(model))
    passes = task.measurements.of("drafts", about, PassCosts, lambda: measure_pass_costs(model, depths))
    return _Costs(exits, passes)
