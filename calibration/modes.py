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
from exeunt.compression.variant import SkippedKV, Variant

LOOSE_SHARE: Final = 0.15
"""Tokens that leave at the looser, uncertified threshold, by the gates' view of full-depth states."""


def modes_of(
    variants: Sequence[Variant],
    reference: Variant,
    deployed: Variant,
    risk_table: Sequence[RiskEntry],
    loose: Mapping[Variant, float],
) -> list[Mode]:
    """The modes to evaluate, the reference first.

    Exits are shown with propagated keys and values for every variant, and for the `deployed` one also with backfill:
    where both skip alike, more rows would say the same. The verified mode has no row: its output is that of exits off.
    """
    modes = []
    for variant in [reference, *(variant for variant in variants if variant != reference)]:
        modes.append(Mode(variant))
        methods: tuple[SkippedKV, ...] = ("propagate", "backfill") if variant == deployed else ("propagate",)
        for skipped_kv in methods:
            modes += _with_exits(variant, skipped_kv, risk_table, loose.get(variant))
    return modes


def _with_exits(
    variant: Variant, skipped_kv: SkippedKV, risk_table: Sequence[RiskEntry], loose: float | None
) -> list[Mode]:
    """One mode for each certified target, of those that share a threshold the strictest.

    Where no certified target lets `WORTHWHILE` of the tokens leave, there is also one at the `loose` threshold.
    """
    entries = {(entry.variant, entry.skipped_kv): entry for entry in risk_table}
    found = entries.get((variant, skipped_kv))
    modes: dict[float, Mode] = {}
    certified = [line for line in found.targets if line.certified] if found is not None else []
    for line in sorted(certified, key=lambda each: each.target):
        if line.threshold is not None:
            modes.setdefault(line.threshold, Mode(variant, line.threshold, line.target, skipped_kv))
    shown = list(modes.values())
    if loose is not None and not any((line.exit_rate or 0.0) >= WORTHWHILE for line in certified):
        shown.append(Mode(variant, loose, None, skipped_kv))
    return shown


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
