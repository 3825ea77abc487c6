"""Calibration from a checkpoint and a text to a bundle: the steps in order, each in its own module.

Nothing is written at the target before everything is decided; hidden states go to a temporary folder that is gone
when calibration ends, however it ends.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exeunt.calibration.activations import BlockVisitor, Scratch, StateKeeper, stream_blocks
from exeunt.calibration.block_choice import BlockChoice, BlockFitter, choose_block
from exeunt.calibration.bundle_manifest import CorpusRecord, build_manifest, data_name
from exeunt.calibration.certificates import CertifiedVariant, certify_passes, certify_variants, rows_for
from exeunt.calibration.corpus import Corpus, Splits, read_corpus, split_corpus
from exeunt.calibration.evaluation import EvaluationTable, evaluate_modes
from exeunt.calibration.exit_fit import ExitData, FittedExit, fit_exits, top_tokens
from exeunt.calibration.exit_selection import ExitSelection, select_exits
from exeunt.calibration.kernel_compilation import compile_kernels
from exeunt.calibration.model_stack import ModelStack, final_exit_norm
from exeunt.calibration.modes import loose_threshold, modes_of
from exeunt.calibration.options import (
    CalibrationOptions,
    drafting_blocks,
    exit_blocks,
    resolve_device,
    wanted_linear_block,
)
from exeunt.calibration.phases import planned_phases
from exeunt.calibration.progress import NumberedProgress, ProgressReport
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.json_report import report_json
from exeunt.calibration.report.page import report_html
from exeunt.calibration.risk import percent
from exeunt.calibration.text_encoding import separator, text_encoding
from exeunt.calibration.weights_int4 import Int4Weights, check_group_size, quantize_weights
from exeunt.compression.bundle import checkpoint_sha256
from exeunt.compression.bundle_weights import checkpoint_tensors, tensors_beside_int4
from exeunt.compression.bundle_writer import BundleContents, check_target, tensor_bytes, write_bundle
from exeunt.compression.checkpoint import Checkpoint, open_checkpoint
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.model import default_dtype, load_tokenizer

CHOICE_TOKENS = 8_000
"""Tokens of the select split that the linear block's candidates are compared on."""


@dataclass(frozen=True, slots=True)
class _Task:
    """What stays the same through a calibration."""

    options: CalibrationOptions
    checkpoint: Checkpoint
    device: torch.device
    exits: tuple[int, ...]  # the blocks that exits are fitted behind
    corpus: Corpus
    splits: Splits
    progress: ProgressReport


@dataclass(frozen=True, slots=True)
class _Learned:
    """What the fit and select splits gave."""

    stack: ModelStack
    choice: BlockChoice | None
    candidates: tuple[FittedExit, ...]
    selection: ExitSelection


def calibrate(options: CalibrationOptions, progress: ProgressReport) -> Path:
    """Make the bundle that `options` asks for and return where it stands.

    Raises CalibrationError (OptionError for the options, CorpusError for the text), BundleError for the target, and
    CheckpointError, ConfigError, UnsupportedModelError, WeightError or ModelLoadError for the model. Whatever is
    raised, KeyboardInterrupt included, leaves no bundle, and an older bundle at the target as it was.
    """
    target = check_target(options.out)
    task = _prepare(options, progress)
    compile_kernels(task.device, task.progress)
    int4 = _quantized(task)
    dtype = options.dtype or default_dtype(task.checkpoint.spec, task.device)
    with task.progress.phase("Loading the model", 1 if int4 is None else 2) as advance:
        stack = ModelStack.build(
            task.checkpoint,
            int4,
            options.kv_cache,
            task.device,
            dtype,
            advance,
            int4_alone=options.weights == "int4",
            streamed=options.stream_weights,
        )
    with tempfile.TemporaryDirectory(prefix="exeunt-calibrate-") as folder:
        learned = _learn(task, stack, Scratch(Path(folder)))
    certified = _certify(task, learned)
    table = _evaluate(task, learned, certified)
    contents = _contents(task, int4, learned, certified, table)
    with task.progress.phase("Writing the bundle", tensor_bytes(contents)) as advance:
        return write_bundle(target, contents, advance).path


def _prepare(options: CalibrationOptions, progress: ProgressReport) -> _Task:
    """Everything that can be refused, refused before the long work."""
    device = resolve_device(options.device)
    checkpoint = open_checkpoint(options.model)
    spec = checkpoint.spec
    certified = exit_blocks(spec, options.exits)
    exits = sorted({*certified, *drafting_blocks(spec, options.exits, options.drafting_exit)})
    wanted_linear_block(spec, options.linear_block)
    if options.weights != "full":
        check_group_size(spec, options.group_size)
    progress.note(f"Reading {options.model} and {options.data}.")
    tokenizer = load_tokenizer(checkpoint.directory)
    corpus = read_corpus(options.data, separator(tokenizer))
    splits = split_corpus(
        corpus,
        text_encoding(tokenizer, spec),
        tokens=options.tokens,
        row_tokens=min(options.row_tokens, spec.max_position_embeddings),
        seed=options.seed,
        least=options.least_tokens,
    )
    shown = ", ".join(f"{count:,} to {name}" for name, count in splits.tokens().items())
    progress.note(f"{_documents(corpus)}, tokens: {shown}")
    numbered = NumberedProgress(progress, planned_phases(options, spec, device))
    return _Task(options, checkpoint, device, tuple(exits), corpus, splits, numbered)


def _quantized(task: _Task) -> Int4Weights | None:
    if task.options.weights == "full":
        return None
    spec = task.checkpoint.spec
    with task.progress.phase("Quantising weights", spec.blocks + 1) as advance:
        return quantize_weights(
            task.checkpoint.weights(), spec, task.options.group_size, task.device, advance
        )


def _learn(task: _Task, stack: ModelStack, scratch: Scratch) -> _Learned:
    """Everything that is fitted or chosen, from one streaming pass of the fit and select splits."""
    options, spec, splits = task.options, task.checkpoint.spec, task.splits
    rows = (*splits.fit, *splits.select)
    fit_tokens, tokens = splits.tokens()["fit"], sum(map(len, rows))
    model = stack.forced(stack.deployed, ())
    keeper = StateKeeper(task.exits, tokens, spec.hidden_size, model.decoder.dtype, scratch)
    fitter = BlockFitter(spec.hidden_size, spec.block_parameters, fit_tokens, task.device)
    visitors: list[BlockVisitor] = [keeper] if options.linear_block == "none" else [keeper, fitter]
    with task.progress.phase("Collecting activations", tokens * spec.blocks) as advance:
        final = stream_blocks(
            model, rows, visitors, scratch, batch_tokens=options.batch_tokens, advance=advance
        )
    choice = _choose_block(task, stack, fitter) if options.linear_block != "none" else None
    with task.progress.phase("Asking the full model", tokens) as advance:
        top = top_tokens(model, final, advance)
    data = ExitData(keeper.states, final, top, fit_tokens)
    norm = final_exit_norm(task.checkpoint, task.device)
    exits = fit_exits(model, norm, data, options.head, options.probe, options.seed, task.progress, stack.full)
    for each in exits:
        task.progress.note(
            f"{each.head.name}: agreement {each.training.untrained_agreement:.1%} untrained, "
            f"{each.training.agreement:.1%} trained, AUC {each.gate.auc:.3f}"
        )
    chosen = None if choice is None or choice.chosen is None else choice.chosen.map
    selection = select_exits(
        stack.forced(stack.deployed, [each.head for each in exits]),
        exits,
        data,
        splits.select,
        splits.tokens()["certify"],
        options,
        task.progress,
    )
    return _Learned(stack.with_linear_block(chosen), choice, exits, selection)


def _choose_block(task: _Task, stack: ModelStack, fitter: BlockFitter) -> BlockChoice:
    options = task.options
    rows = _head_rows(task.splits.select, CHOICE_TOKENS)
    with task.progress.phase("Comparing linear blocks", sum(map(len, rows))) as advance:
        choice = choose_block(
            stack.forced(stack.deployed, ()),
            stack.deployed.kv_cache,
            fitter.fits,
            rows,
            wanted_linear_block(task.checkpoint.spec, options.linear_block),
            batch_tokens=options.batch_tokens,
            advance=advance,
        )
    if choice.chosen is not None:
        cost = next(each for each in choice.candidates if each.blocks == (choice.chosen.block,))
        task.progress.note(
            f"linear block {choice.chosen.block}, rank {choice.chosen.map.rank}: R² {choice.chosen.r2_cut:.3f}, "
            f"perplexity {cost.increase:+.2f}"
        )
    return choice


def _certify(task: _Task, learned: _Learned) -> tuple[CertifiedVariant, ...]:
    heads, plan = [each.head for each in learned.selection.certified], learned.selection.plan
    if not heads:
        return ()
    rows, passes = task.splits.certify, certify_passes(heads, plan)
    tokens = sum(sum(map(len, rows_for(variant, learned.stack, rows))) for variant in learned.stack.variants)
    with task.progress.phase("Certifying thresholds", passes * tokens) as advance:
        certified = certify_variants(
            learned.stack,
            heads,
            rows,
            plan,
            batch_tokens=task.options.batch_tokens,
            confidence=task.options.confidence,
            advance=advance,
        )
    for each in certified:
        found = [c for c in each.certification.certificates if c.certified]
        shown = ", ".join(
            f"{percent(c.target)} at {c.threshold:.3f} ({c.exits / c.tokens:.1%} leave)" for c in found
        )
        task.progress.note(f"{each.variant}, {each.skipped_kv}: {shown or 'no exits certified'}")
    if not any(target.certified for each in certified for target in each.certification.certificates):
        task.progress.note(_uncertified(certified, task.splits.tokens()["certify"]))
    return certified


def _uncertified(outcomes: Sequence[CertifiedVariant], tokens: int) -> str:
    """That nothing is certified, why, and what helps. `tokens` are those of the certify split."""
    of_targets = [target for each in outcomes for target in each.certification.certificates]
    most = max(of_targets, key=lambda target: target.target)  # the loosest: what it fell short of is least
    return (
        f"No target is certified for any variant, so no request may ask for one ({percent(most.target)}, the loosest: "
        f"{most.reason}); the certify split had {tokens:,} tokens: give more text or more --tokens."
    )


def _evaluate(task: _Task, learned: _Learned, certified: tuple[CertifiedVariant, ...]) -> EvaluationTable:
    options, stack = task.options, learned.stack
    heads = [each.head for each in learned.selection.certified]
    models = {variant: stack.forced(variant, heads) for variant in (*stack.variants, stack.reference)}
    rows = _head_rows(task.splits.certify, options.evaluation_tokens)
    loose = {}
    if heads:
        deployed = models[stack.deployed]
        threshold = loose_threshold(deployed, rows, task.progress, batch_tokens=options.batch_tokens)
        loose = dict.fromkeys(stack.variants, threshold)
    risk_table = [each.entry(options.confidence) for each in certified]
    modes = modes_of(stack.variants, stack.reference, stack.deployed, risk_table, loose)
    with task.progress.phase("Evaluating every mode", len(modes) * sum(map(len, rows))) as advance:
        return evaluate_modes(
            modes,
            models,
            rows,
            text=f"{data_name(options.data)}, certify split",
            batch_tokens=options.batch_tokens,
            seed=options.seed,
            advance=advance,
        )


def _contents(
    task: _Task,
    int4: Int4Weights | None,
    learned: _Learned,
    certified: tuple[CertifiedVariant, ...],
    table: EvaluationTable,
) -> BundleContents:
    chosen: LinearBlock | None = None
    if learned.choice is not None and learned.choice.chosen is not None:
        chosen = learned.choice.chosen.map
    files = task.checkpoint.files
    with task.progress.phase("Hashing the checkpoint", sum(file.stat().st_size for file in files)) as advance:
        sha256 = checkpoint_sha256(files, advance)
    manifest = build_manifest(
        task.checkpoint,
        sha256,
        task.options,
        CorpusRecord(task.corpus, task.splits),
        learned.stack,
        learned.choice,
        learned.selection,
        certified,
        table,
    )
    content = ReportContent(
        manifest, learned.choice, learned.candidates, learned.selection, certified, table, int4
    )
    return BundleContents(
        checkpoint=task.checkpoint.directory,
        manifest=manifest,
        full=checkpoint_tensors(files) if "full" in manifest.weights else None,
        int4=None if int4 is None else _int4_tensors(task, int4),
        linear_block=chosen,
        exits=[each.head for each in learned.selection.kept],
        report_html=report_html(content),
        report_json=report_json(content),
    )


def _int4_tensors(task: _Task, int4: Int4Weights) -> Mapping[str, Tensor]:
    """What the INT4 file holds: where no full weights lie beside it, also all that has no INT4 form."""
    if task.options.weights == "both":
        return int4.tensors()
    beside = tensors_beside_int4(task.checkpoint.spec, task.checkpoint.weights())
    return {**int4.tensors(), **beside}


def _documents(corpus: Corpus) -> str:
    count = len(corpus.documents)
    return "1 document" if count == 1 else f"{count:,} documents"


def _head_rows(rows: tuple[Tensor, ...], tokens: int) -> tuple[Tensor, ...]:
    """The first rows, up to `tokens` tokens, at least one. Rows of a split come from its documents in turn."""
    kept: list[Tensor] = []
    held = 0
    for row in rows:
        if kept and held + len(row) > tokens:
            break
        kept.append(row)
        held += len(row)
    return tuple(kept)
