"""What stays the same through a calibration: what is asked, of which model, on which text, and where it is told."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exeunt.calibration.activations import Scratch
from exeunt.calibration.corpus import Corpus, Splits, read_corpus, split_corpus
from exeunt.calibration.fingerprint import calibration_fingerprint
from exeunt.calibration.journal import FolderJournal, Journal, NoJournal
from exeunt.calibration.options import (
    CalibrationOptions,
    checked_work_folder,
    drafting_blocks,
    exit_blocks,
    resolve_device,
    wanted_linear_block,
)
from exeunt.calibration.phases import planned_phases
from exeunt.calibration.progress import NumberedProgress, ProgressReport
from exeunt.calibration.remembered import MeasuredNow, Measurements, RememberedCosts, costs_folder
from exeunt.calibration.scratch_folder import check_bundle_can_stand, remove_partial_bundles, scratch_folder
from exeunt.calibration.text_encoding import separator, text_encoding
from exeunt.calibration.weight_check import check_weights
from exeunt.calibration.weights_int4 import Int4Plan, check_group_size
from exeunt.compression.architecture import Architecture
from exeunt.compression.checkpoint import Checkpoint, open_checkpoint
from exeunt.compression.model import default_dtype
from exeunt.compression.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class Task:
    """A calibration that can be done. `journal` and `scratch` are those of `opened`."""

    options: CalibrationOptions
    checkpoint: Checkpoint
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    corpus: Corpus
    splits: Splits
    progress: ProgressReport
    measurements: Measurements
    journal: Journal
    scratch: Scratch

    @property
    def spec(self) -> Architecture:
        """The model's shape."""
        return self.checkpoint.spec

    @property
    def int4_plan(self) -> Int4Plan | None:
        """How weights are quantised; None where they are not."""
        options = self.options
        if options.weights == "full":
            return None
        return Int4Plan(
            group_size=options.group_size, rounding=options.rounding, hessian_tokens=options.hessian_tokens
        )


@contextmanager
def opened(options: CalibrationOptions, progress: ProgressReport) -> Iterator[Task]:
    """The task, everything that can be refused having been refused; hidden states are kept as long as it is open.

    Unfinished work is kept where `options` say so, and removed when the task was closed without an error.
    """
    device = resolve_device(options.device)
    checkpoint = open_checkpoint(options.model)
    spec = checkpoint.spec
    exit_blocks(spec, options.exits)
    drafting_blocks(spec, options.drafting_exit)
    wanted_linear_block(spec, options.linear_block)
    if options.weights != "full":
        check_group_size(spec, options.group_size)
    check_bundle_can_stand(options.out)
    kept_in = checked_work_folder(options, spec)
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
    progress.note(f"{corpus.in_words()}, tokens: {shown}")
    numbered = NumberedProgress(progress, planned_phases(options, spec, device))
    with numbered.phase("Checking the weights", spec.blocks + 1) as advance:
        check_weights(checkpoint.weights(), spec, advance)
    remove_partial_bundles(options.out)
    with _kept(options, kept_in, checkpoint, corpus.sha256, splits, progress) as (journal, folder):
        yield Task(
            options=options,
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            device=device,
            dtype=options.dtype or default_dtype(spec, device),
            corpus=corpus,
            splits=splits,
            progress=numbered,
            measurements=_measurements(options),
            journal=journal,
            scratch=Scratch(folder),
        )


@contextmanager
def _kept(
    options: CalibrationOptions,
    folder: Path | None,
    checkpoint: Checkpoint,
    corpus_sha256: str,
    splits: Splits,
    progress: ProgressReport,
) -> Iterator[tuple[Journal, Path]]:
    """The journal in `folder`, and the folder of hidden states: gone at the end, or kept for whoever goes on.

    Where `folder` is None nothing is kept.
    """
    if folder is None:
        with scratch_folder(options.out) as scratch:
            yield NoJournal(), scratch
        return
    journal = FolderJournal(folder, calibration_fingerprint(options, checkpoint, corpus_sha256, splits))
    try:
        if journal.resumed:
            progress.note(f"Going on from the unfinished work in {folder}.")
        yield journal, journal.scratch
        journal.remove()
    finally:
        journal.close()


def _measurements(options: CalibrationOptions) -> Measurements:
    if options.costs == "now":
        return MeasuredNow()
    return RememberedCosts(costs_folder(), anew=options.costs == "anew")
