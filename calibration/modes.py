"""Which modes of a model are evaluated: every variant with exits off, at each certified target, or looser."""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from exeunt.calibration.evaluation import WORTHWHILE, Mode
from exeunt.calibration.exit_training import Labelled
from exeunt.calibration.progress import Advance, ProgressReport
from exeunt.calibration.sequence_batch import SequenceBatch, batches
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.calibration.thresholds import view_gates
from exeunt.compression.manifest import RiskEntry
from exeunt.compression.variant import Variant

LOOSE_SHARE: Final = 0.15
"""Tokens that leave at the looser, uncertified threshold, by the gates' view of full-depth states."""


def modes_of(
    variants: Sequence[Variant],
    reference: Variant,
    risk_table: Sequence[RiskEntry],
    loose: Mapping[Variant, float],
) -> list[Mode]:
    """The modes to evaluate, the reference first.

    Targets that share a threshold are one mode, the strictest's. A variant of which no certified target lets
    `WORTHWHILE` of the tokens leave is also shown at its threshold in `loose`, where it has one.
    """
    entries = {entry.variant: entry for entry in risk_table if entry.skipped_kv == "propagate"}
    ordered = [reference, *(variant for variant in variants if variant != reference)]
    modes = []
    for variant in ordered:
        modes.append(Mode(variant))
        lines = entries[variant].targets if variant in entries else ()
        certified = [line for line in lines if line.certified and line.threshold is not None]
        seen: set[float] = set()
        for line in sorted(certified, key=lambda each: each.target):
            if line.threshold is not None and line.threshold not in seen:
                seen.add(line.threshold)
                modes.append(Mode(variant, line.threshold, line.target))
        worth = any((line.exit_rate or 0.0) >= WORTHWHILE for line in certified)
        if not worth and variant in loose:
            modes.append(Mode(variant, loose[variant]))
    return modes


def loose_threshold(
    model: ForcedModel, rows: Sequence[Tensor], progress: ProgressReport, *, batch_tokens: int
) -> float:
    """A threshold at which about `LOOSE_SHARE` of the first batch of `rows` leaves, exits not changing later tokens."""
    batch = next(batches(rows, batch_tokens, model.decoder.device))
    work = batch.tokens * (1 + 2 * len(model.exits))  # to the end, to each exit, and each exit's gate
    with progress.phase("Looking for a looser threshold", work) as advance:
        return _loose_threshold(model, rows, batch, advance)


@torch.inference_mode()
def _loose_threshold(
    model: ForcedModel, rows: Sequence[Tensor], batch: SequenceBatch, advance: Advance
) -> float:
    _, final = model.full_depth(batch)
    top = model.top_tokens(final)
    advance(batch.tokens)
    states = []
    hidden = model.decoder.embed(batch.token_ids, batch.positions)
    geometry, start = batch.geometry(model.layout.page_tokens), 0
    for head in model.exits:
        hidden = model.decoder.run_blocks(hidden, geometry, model.pages(batch), start, head.depth)
        states.append(Labelled(hidden, top))
        start = head.depth
        advance(batch.tokens)
    own = rows[: batch.row_count]
    best = view_gates(model.exits, states, own, model.decoder.project_exit, advance).reach.max(0)
    return float(np.clip(np.round(np.quantile(best, 1.0 - LOOSE_SHARE), 2), 0.01, 0.99))
