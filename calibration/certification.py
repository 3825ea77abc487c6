"""Which thresholds are certified: those of a plan, tested on the held-out split from strict to loose.

Where skipped keys and values are propagated, each threshold is a real pass with exits, `ForcedModel.with_exits`. Where
they are backfilled, states are those of full depth, so that one look of each gate at each token tells of every
threshold. Testing stops when every target's sequence has ended (`exeunt.calibration.risk`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exeunt.calibration.exit_training import Labelled
from exeunt.calibration.risk import CONFIDENCE, Certificate, ExitCounts, FixedSequence
from exeunt.calibration.sequence_batch import SequenceBatch, batches
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.calibration.thresholds import Advance, GateView, ThresholdPlan, gate_reach, text_blocks, view_of

Count = Callable[[float], tuple[ExitCounts, tuple[int, ...]]]
"""By threshold: exits and errors by block of text, and how many tokens left at each exit."""


@dataclass(frozen=True, slots=True)
class Certification:
    """What certifying one combination found: a certificate per target, and the counts at each threshold tested."""

    certificates: tuple[Certificate, ...]
    tested: tuple[tuple[float, ExitCounts], ...]
    by_exit: tuple[tuple[float, tuple[int, ...]], ...]  # tokens that left at each exit, by threshold


@dataclass(frozen=True, slots=True)
class FullDepthPass:
    """Some rows at full depth: their batches, and what exits and tests need of each."""

    groups: tuple[SequenceBatch, ...]
    entries: tuple[Tensor, ...]  # by batch, the states [T, H] behind the first exit's block
    tops: tuple[Tensor, ...]  # by batch, the full-depth top tokens [T]
    view: GateView  # of the gates, down to the `least` threshold that was asked for
    text_blocks: NDArray[np.int64]  # [T] over all batches


@torch.inference_mode()
def full_depth_pass(
    model: ForcedModel,
    rows: Sequence[Tensor],
    least: float,
    *,
    batch_tokens: int,
    advance: Advance = lambda _tokens: None,
) -> FullDepthPass:
    """Run `rows` at full depth and ask every gate about every token; `advance` is told the tokens.

    Of tokens that leave at no threshold from `least` on the view says only that.
    """
    groups = tuple(batches(rows, batch_tokens, model.decoder.device))
    entries, tops, seen = [], [], []
    for group in groups:
        states, final = model.full_depth_at_exits(group)
        top = model.top_tokens(final)
        entries.append(states[0])
        tops.append(top)
        seen.append(_asked(model, states, top, least))
        advance(group.tokens)
    reach, projects, agrees = (np.concatenate(parts, axis=1) for parts in zip(*seen, strict=True))
    view = view_of(reach, projects, agrees.astype(bool), rows)
    return FullDepthPass(groups, tuple(entries), tuple(tops), view, text_blocks(rows))


def _asked(
    model: ForcedModel, states: Sequence[Tensor], top: Tensor, least: float
) -> tuple[NDArray[np.float64], ...]:
    """Reach, projection and agreement, each [exits, T], of one batch."""
    of_exits = [
        gate_reach(head, Labelled(hidden, top), model.decoder.project_exit, least)
        for head, hidden in zip(model.exits, states, strict=True)
    ]
    return tuple(torch.stack(part).double().cpu().numpy() for part in zip(*of_exits, strict=True))


def certify_propagated(
    model: ForcedModel,
    full_depth: FullDepthPass,
    plan: ThresholdPlan,
    *,
    confidence: float = CONFIDENCE,
    advance: Advance = lambda _tokens: None,
) -> Certification:
    """Test the plan's thresholds by real passes with exits, skipped keys and values propagated.

    Differing means differing from the top token of `model` itself at full depth. `advance` is told the tokens of
    every pass; a sequence that ends early leaves some untold.
    """
    return _certified(plan, confidence, lambda threshold: _count(model, full_depth, threshold, advance))


def certify_backfilled(
    full_depth: FullDepthPass, plan: ThresholdPlan, *, confidence: float = CONFIDENCE
) -> Certification:
    """Test the plan's thresholds on full-depth states, which are those that backfill leaves; no further pass."""
    view = full_depth.view

    def count(threshold: float) -> tuple[ExitCounts, tuple[int, ...]]:
        split = np.bincount(view.leave_at(threshold), minlength=len(view.reach) + 1)[:-1]
        return view.counts(threshold), tuple(int(number) for number in split)

    return _certified(plan, confidence, count)


def _certified(plan: ThresholdPlan, confidence: float, count: Count) -> Certification:
    sequences = [
        FixedSequence(target, begin, plan.correlation, confidence) for target, begin in plan.begins.items()
    ]
    tested: list[tuple[float, ExitCounts]] = []
    by_exit: list[tuple[float, tuple[int, ...]]] = []
    for threshold in plan.thresholds:
        if not any(sequence.open for sequence in sequences):
            break
        counts, split = count(threshold)
        tested.append((threshold, counts))
        by_exit.append((threshold, split))
        for sequence in sequences:
            sequence.test(threshold, counts)
    return Certification(tuple(each.certificate for each in sequences), tuple(tested), tuple(by_exit))


def _count(
    model: ForcedModel, full_depth: FullDepthPass, threshold: float, advance: Advance
) -> tuple[ExitCounts, tuple[int, ...]]:
    where = full_depth.text_blocks
    blocks = int(where[-1]) + 1
    exits, errors = np.zeros(blocks), np.zeros(blocks)
    by_exit = [0] * len(model.exits)
    start = 0
    for group, entry, top in zip(full_depth.groups, full_depth.entries, full_depth.tops, strict=True):
        own = where[start : start + group.tokens]

        def note(
            number: int, tokens: Tensor, logits: Tensor, top: Tensor = top, own: NDArray[np.int64] = own
        ) -> None:
            differs = (logits.argmax(-1) != top[tokens]).cpu().numpy()
            at = own[tokens.cpu().numpy()]
            np.add.at(exits, at, 1.0)
            np.add.at(errors, at[differs], 1.0)
            by_exit[number] += len(at)

        model.with_exits(group, threshold, entry, note, to_the_end=False)
        start += group.tokens
        advance(group.tokens)
    return ExitCounts(exits, errors, len(where)), tuple(by_exit)
