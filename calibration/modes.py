"""Which modes of a model are evaluated: every variant with exits off, at each certified target, or looser.

Beside these a sweep of the deployed variant's threshold, of which nothing is certified: the curve of quality against
compute.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from exeunt.compression.manifest import NllRiskEntry, NllRiskTarget, RiskEntry, RiskTarget
from exeunt.compression.variant import SkippedKV, Variant

LOOSE_SHARE: Final = 0.15
"""Tokens that leave at the looser, uncertified threshold, by the gates' view of full-depth states."""
SWEEP_SHARES: Final = (0.05, 0.1, 0.2, 0.35, 0.6)
"""Tokens that leave along the sweep, likewise. Backfilled every one is nearly free; every second is propagated too."""


@dataclass(frozen=True, slots=True)
class ModePlan:
    """The modes to evaluate, the reference first, and those of the sweep."""

    modes: tuple[Mode, ...]
    sweep: tuple[Mode, ...]


def plan_modes(
    models: Mapping[Variant, ForcedModel],
    variants: Sequence[Variant],
    reference: Variant,
    deployed: Variant,
    risk_table: Sequence[RiskEntry],
    rows: Sequence[Tensor],
    progress: ProgressReport,
    *,
    batch_tokens: int,
    nll_table: Sequence[NllRiskEntry] = (),
    both: bool = False,
) -> ModePlan:
    """The modes of `variants` and the sweep of the `deployed` one. One phase of `progress` where there are exits.

    Thresholds that nothing certifies come from the gates' view of the first batch of `rows`. `nll_table` and `both` as
    in `modes_of`.
    """
    if not models[deployed].exits:
        return ModePlan(tuple(modes_of(variants, reference, deployed, (), {}, both=both)), ())
    shares = (LOOSE_SHARE, *SWEEP_SHARES)
    loose, *swept = exit_thresholds(models[deployed], rows, shares, progress, batch_tokens=batch_tokens)
    by_variant = dict.fromkeys(variants, _rounded(loose))
    modes = modes_of(variants, reference, deployed, risk_table, by_variant, nll_table=nll_table, both=both)
    return ModePlan(tuple(modes), tuple(sweep_modes(deployed, swept)))


def sweep_modes(deployed: Variant, thresholds: Sequence[float]) -> list[Mode]:
    """The modes along the trade-off: `deployed` at every threshold with backfill, at every second with propagate."""
    distinct = list(dict.fromkeys(thresholds))
    return [
        *(Mode(deployed, threshold, None, "backfill") for threshold in distinct),
        *(Mode(deployed, threshold, None, "propagate") for threshold in distinct[::2]),
    ]


def modes_of(
    variants: Sequence[Variant],
    reference: Variant,
    deployed: Variant,
    risk_table: Sequence[RiskEntry],
    loose: Mapping[Variant, float],
    *,
    nll_table: Sequence[NllRiskEntry] = (),
    both: bool = False,
) -> list[Mode]:
    """The modes to evaluate, the reference first.

    Exits are shown with backfilled keys and values, which is what a server does unless asked otherwise, and for the
    `deployed` variant, or with `both` for all of them, also with propagated ones: each of these is a pass of its own,
    so that without `both` they are shown at the targets of `risk_table` alone. The verified mode has no row: its output
    is that of exits off.
    """
    modes = []
    for variant in [reference, *(variant for variant in variants if variant != reference)]:
        modes.append(Mode(variant))
        methods: tuple[SkippedKV, ...] = ("backfill",)
        if both or variant == deployed:
            methods = ("backfill", "propagate")
        for skipped_kv in methods:
            shares = [
                line
                for entry in risk_table
                if (entry.variant, entry.skipped_kv) == (variant, skipped_kv)
                for line in entry.targets
            ]
            nats = [
                line
                for entry in (nll_table if both or skipped_kv == "backfill" else ())
                if (entry.variant, entry.skipped_kv) == (variant, skipped_kv)
                for line in entry.targets
            ]
            modes += _with_exits(variant, skipped_kv, shares, nats, loose.get(variant))
    return modes


def _with_exits(
    variant: Variant,
    skipped_kv: SkippedKV,
    shares: Sequence[RiskTarget],
    nats: Sequence[NllRiskTarget],
    loose: float | None,
) -> list[Mode]:
    """One mode for each threshold that is certified for a target of disagreement, then those of the NLL increase.

    Of targets of one risk that share a threshold the strictest is named. Where no certified target lets `WORTHWHILE` of
    the tokens leave, there is also a mode at the `loose` threshold.
    """
    modes: dict[float, Mode] = {}
    for line in sorted((line for line in shares if line.certified), key=lambda each: each.target):
        if line.threshold is not None:
            modes.setdefault(line.threshold, Mode(variant, line.threshold, line.target, skipped_kv))
    for nll in sorted((line for line in nats if line.certified), key=lambda each: each.target):
        if nll.threshold is not None:
            known = modes.get(nll.threshold, Mode(variant, nll.threshold, None, skipped_kv))
            if known.nll_target is None:
                modes[nll.threshold] = replace(known, nll_target=nll.target)
    shown = list(modes.values())
    lines: list[RiskTarget | NllRiskTarget] = [*shares, *nats]
    enough = any(line.certified and (line.exit_rate or 0.0) >= WORTHWHILE for line in lines)
    if loose is not None and not enough:
        shown.append(Mode(variant, loose, None, skipped_kv))
    return shown


def exit_thresholds(
    model: ForcedModel,
    rows: Sequence[Tensor],
    shares: Sequence[float],
    progress: ProgressReport,
    *,
    batch_tokens: int,
) -> tuple[float, ...]:
    """For each share a threshold at which about that many tokens of the first batch of `rows` leave.

    It is the gates' view of full-depth states: exits do not change later tokens in it.
    """
    batch = next(batches(rows, batch_tokens, model.decoder.device))
    work = batch.tokens * (1 + 2 * len(model.exits))  # to the end, to each exit, and each exit's gate
    with progress.phase("Looking for looser thresholds", work) as advance:
        best = _best_reach(model, rows, batch, advance)
    return tuple(
        float(np.clip(np.round(np.quantile(best, 1.0 - share), 4), 1e-4, 0.9999)) for share in shares
    )


@torch.inference_mode()
def _best_reach(
    model: ForcedModel, rows: Sequence[Tensor], batch: SequenceBatch, advance: Advance
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The largest threshold at which each token of `batch` that might leave does."""
    states, final = model.full_depth_at_exits(batch)
    top = model.top_tokens(final)
    advance(batch.tokens * (1 + len(model.exits)))
    labelled = [Labelled(hidden, top) for hidden in states]
    own = rows[: batch.row_count]
    view = view_gates(model.exits, labelled, own, model.decoder.project_exit, advance)
    best: np.ndarray[tuple[int], np.dtype[np.float64]] = view.best
    return best


def _rounded(threshold: float) -> float:
    return float(np.clip(np.round(threshold, 2), 0.01, 0.99))
