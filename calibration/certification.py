"""Which thresholds are certified: those of a plan, tested on the held-out split from strict to loose.

Two risks are tested: disagreement of the tokens that leave (`exeunt.calibration.risk`) and the mean increase of the
negative log-likelihood over all tokens (`exeunt.calibration.nll_risk`). Where skipped keys and values are backfilled,
states are those of full depth, so that one look of each gate at each token tells of every threshold. Where they are
propagated, each threshold is a real pass with exits, `ForcedModel.with_exits`; for disagreement it may stop at the last
exit, the other risk needs it to the end, because tokens that stay attend to what the others left behind. Testing
stops when every target's sequence has ended.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exeunt.calibration.exit_training import Labelled
from exeunt.calibration.fixed_sequence import FixedSequence
from exeunt.calibration.nll_risk import NllCertificate, NllCounts, nll_sequence
from exeunt.calibration.risk import CONFIDENCE, Certificate, ExitCounts, disagreement_sequence
from exeunt.calibration.sequence_batch import SequenceBatch, batches
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.calibration.thresholds import Advance, GateView, Steps, ThresholdPlan, gate_reach, view_of
from exeunt.calibration.token_losses import TokenLosses, exit_nll, nll_of

Front = Mapping[int, Tensor]
"""The states [n, H] of a row behind its first so many blocks, for the depths in front of the linear block."""
ByExit = tuple[int, ...]
"""How many tokens left at each exit."""


@dataclass(frozen=True, slots=True)
class Certification:
    """What certifying disagreement of one combination found: a certificate per target, the counts at each threshold."""

    certificates: tuple[Certificate, ...]
    tested: tuple[tuple[float, ExitCounts], ...]
    by_exit: tuple[tuple[float, ByExit], ...]  # tokens that left at each exit, by threshold


@dataclass(frozen=True, slots=True)
class NllCertification:
    """What certifying the NLL increase of one combination found, as `Certification`; `clip` is in nats."""

    certificates: tuple[NllCertificate, ...]
    tested: tuple[tuple[float, NllCounts], ...]


@dataclass(frozen=True, slots=True)
class FullDepthPass:
    """Some rows at full depth: their batches, and what exits and tests need of each."""

    groups: tuple[SequenceBatch, ...]
    entries: tuple[Tensor, ...]  # by batch, the states [T, H] behind the first exit's block
    tops: tuple[Tensor, ...]  # by batch, the full-depth top tokens [T]
    view: GateView  # of the gates, down to the `least` threshold that was asked for
    losses: TokenLosses | None = None  # at exits of tokens that may leave from `least` on
    fronts: tuple[Front, ...] = ()  # by row, where they were asked for


@torch.inference_mode()
def full_depth_pass(
    model: ForcedModel,
    rows: Sequence[Tensor],
    least: float,
    *,
    batch_tokens: int,
    documents: Sequence[int] | None = None,
    losses: bool = True,
    fork: int | None = None,
    fronts: Sequence[Front] | None = None,
    advance: Advance = lambda _tokens: None,
) -> FullDepthPass:
    """Run `rows` at full depth and ask every gate about every token; `advance` is told the tokens.

    Of tokens that leave at no threshold from `least` on the view says only that. `documents` numbers the document that
    each row was cut from (see `text_units`). Without `losses` nothing can be said of the NLL. With `fork` the states in
    front of that block are kept by row, for the variant whose linear block it is: its pass is given them as `fronts`
    and begins there.
    """
    groups = tuple(batches(rows, batch_tokens, model.decoder.device))
    entries, tops, seen, lost, kept = [], [], [], [], []
    for group in groups:
        by_depth = model.states_by_depth(group, fork, _front_of(group, fronts))
        kept += [] if fork is None else _by_row(group, by_depth, fork)
        states, final = [by_depth[head.depth] for head in model.exits], by_depth[model.blocks]
        top, full = _final(model, group, final, losses)
        entries.append(states[0])
        tops.append(top)
        seen.append(_asked(model, states, top, least))
        if losses:
            lost.append(_losses(model, group, states, full, seen[-1][0] >= least))
        advance(group.tokens)
    reach, looked, whole, agrees = (np.concatenate(parts, axis=1) for parts in zip(*seen, strict=True))
    view = view_of(reach, looked, whole, agrees.astype(bool), rows, documents)
    joined = _joined(lost) if losses else None
    return FullDepthPass(groups, tuple(entries), tuple(tops), view, joined, tuple(kept))


def _front_of(group: SequenceBatch, fronts: Sequence[Front] | None) -> Front | None:
    """The states of a batch's rows, one after another."""
    if fronts is None:
        return None
    rows = fronts[group.first_row : group.first_row + group.row_count]
    return {depth: torch.cat([row[depth] for row in rows]) for depth in rows[0]}


def _by_row(group: SequenceBatch, by_depth: Front, fork: int) -> list[Front]:
    """The batch's states up to the fork, row by row; views of them."""
    lengths = torch.bincount(group.rows).tolist()
    split = {depth: torch.split(states, lengths) for depth, states in by_depth.items() if depth <= fork}
    return [{depth: rows[place] for depth, rows in split.items()} for place in range(len(lengths))]


def _final(model: ForcedModel, group: SequenceBatch, final: Tensor, losses: bool) -> tuple[Tensor, Tensor]:
    """Full depth's top tokens [T] and, with `losses`, its NLL [T] of what follows."""
    top = torch.empty_like(group.token_ids)
    full = torch.zeros(group.tokens, device=final.device)

    def note(_: int, tokens: Tensor, logits: Tensor) -> None:
        top[tokens] = logits.argmax(-1)
        if losses:
            full[tokens] = nll_of(logits, group.targets[tokens])

    model.final(final, torch.arange(group.tokens, device=final.device), note)
    return top, full


def _asked(
    model: ForcedModel, states: Sequence[Tensor], top: Tensor, least: float
) -> tuple[NDArray[np.float64], ...]:
    """What `Reach` holds, each [exits, T], of one batch."""
    of_exits = [
        gate_reach(head, Labelled(hidden, top), model.decoder.project_exit, least)
        for head, hidden in zip(model.exits, states, strict=True)
    ]
    return tuple(torch.stack(part).double().cpu().numpy() for part in zip(*of_exits, strict=True))


def _losses(
    model: ForcedModel,
    group: SequenceBatch,
    states: Sequence[Tensor],
    full: Tensor,
    may_leave: NDArray[np.bool_],
) -> TokenLosses:
    """The losses of one batch; at exits, of the tokens [exits, T] that may leave there."""
    scored = (group.positions > 0) & (group.targets >= 0)
    at_exits = torch.zeros(len(states), group.tokens, device=full.device)
    for place, (head, hidden) in enumerate(zip(model.exits, states, strict=True)):
        asked = torch.from_numpy(may_leave[place]).to(scored.device) & scored
        at_exits[place, asked] = exit_nll(
            head,
            hidden[asked],
            group.targets[asked],
            model.decoder.project_exit,
            model.decoder.spec.vocab_size,
        )
    return TokenLosses(at_exits.double().cpu().numpy(), full.double().cpu().numpy(), scored.cpu().numpy())


def _joined(parts: Sequence[TokenLosses]) -> TokenLosses:
    return TokenLosses(
        np.concatenate([part.at_exits for part in parts], axis=1),
        np.concatenate([part.full for part in parts]),
        np.concatenate([part.scored for part in parts]),
    )


def certify_backfilled(
    full_depth: FullDepthPass, plan: ThresholdPlan, *, confidence: float = CONFIDENCE
) -> Certification:
    """Test the plan's thresholds on full-depth states, which are those that backfill leaves; no further pass."""
    tests = _Disagreement(plan, confidence)
    view = full_depth.view
    for threshold in plan.thresholds:
        if tests.want(threshold):
            split = np.bincount(view.leave_at(threshold), minlength=len(view.reach) + 1)[:-1]
            tests.test(threshold, view.counts(threshold), tuple(int(number) for number in split))
    return tests.outcome


def certify_nll_backfilled(
    full_depth: FullDepthPass, steps: Steps, *, confidence: float = CONFIDENCE
) -> NllCertification:
    """Test the thresholds of `steps` for the NLL increase where skipped keys and values are backfilled.

    Only tokens that leave say anything else than full depth does. Raises ValueError for a pass without losses.
    """
    tests, view, losses = _NllIncrease(steps, confidence), full_depth.view, _known(full_depth)
    for threshold in steps.thresholds:
        if tests.want(threshold):
            exits = view.leave_at(threshold)
            mode, left = losses.left_at(exits), exits < len(view.reach)
            tests.test(threshold, losses.counts(mode, left, view.text_block, view.blocks))
    return tests.outcome


def certify_both_propagated(
    model: ForcedModel,
    full_depth: FullDepthPass,
    plan: ThresholdPlan | None,
    steps: Steps | None,
    *,
    every: int = 1,
    confidence: float = CONFIDENCE,
    advance: Advance = lambda _tokens: None,
) -> tuple[Certification, NllCertification]:
    """Test `plan` for disagreement and `steps` for the NLL increase, by the same passes where thresholds coincide.

    None leaves a risk out; its certification is then empty. The NLL increase is seen on each `every`-th batch of rows.
    `advance` is told the tokens of every pass.
    """
    disagreement = _Disagreement(plan or ThresholdPlan((), {}, 0.0), confidence)
    increase = _NllIncrease(steps or Steps((), {}), confidence)
    for threshold in sorted({*disagreement.thresholds, *increase.thresholds}, reverse=True):
        differs, costs = disagreement.want(threshold), increase.want(threshold)
        if not differs and not costs:
            continue
        seen = _exit_pass(
            model, full_depth, threshold, all_rows=differs, every=every if costs else None, advance=advance
        )
        if differs:
            disagreement.test(threshold, seen.counts, seen.by_exit)
        if costs and seen.increase is not None:
            increase.test(threshold, seen.increase)
    return disagreement.outcome, increase.outcome


@dataclass(slots=True)
class _Disagreement:
    """Every target's sequence, and what they were told."""

    plan: ThresholdPlan
    confidence: float
    sequences: list[FixedSequence[ExitCounts, Certificate]] = field(init=False)
    tested: list[tuple[float, ExitCounts]] = field(default_factory=list)
    by_exit: list[tuple[float, ByExit]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sequences = [
            disagreement_sequence(target, begin, self.plan.correlation, self.confidence)
            for target, begin in self.plan.begins.items()
        ]

    @property
    def thresholds(self) -> tuple[float, ...]:
        return self.plan.thresholds

    def want(self, threshold: float) -> bool:
        return threshold in self.thresholds and any(each.wants(threshold) for each in self.sequences)

    def test(self, threshold: float, counts: ExitCounts, by_exit: ByExit) -> None:
        self.tested.append((threshold, counts))
        self.by_exit.append((threshold, by_exit))
        for sequence in self.sequences:
            sequence.test(threshold, counts)

    @property
    def outcome(self) -> Certification:
        certificates = tuple(each.certificate for each in self.sequences)
        return Certification(certificates, tuple(self.tested), tuple(self.by_exit))


@dataclass(slots=True)
class _NllIncrease:
    """The same for the NLL increase."""

    steps: Steps
    confidence: float
    sequences: list[FixedSequence[NllCounts, NllCertificate]] = field(init=False)
    tested: list[tuple[float, NllCounts]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sequences = [
            nll_sequence(target, begin, self.confidence) for target, begin in self.steps.begins.items()
        ]

    @property
    def thresholds(self) -> tuple[float, ...]:
        return self.steps.thresholds

    def want(self, threshold: float) -> bool:
        return threshold in self.thresholds and any(each.wants(threshold) for each in self.sequences)

    def test(self, threshold: float, counts: NllCounts) -> None:
        self.tested.append((threshold, counts))
        for sequence in self.sequences:
            sequence.test(threshold, counts)

    @property
    def outcome(self) -> NllCertification:
        return NllCertification(tuple(each.certificate for each in self.sequences), tuple(self.tested))


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one pass with exits showed; `increase` only of a pass to the end."""

    counts: ExitCounts
    by_exit: ByExit
    increase: NllCounts | None


def _exit_pass(
    model: ForcedModel,
    full_depth: FullDepthPass,
    threshold: float,
    *,
    all_rows: bool,
    every: int | None,
    advance: Advance,
) -> _Seen:
    """Rows with exits at `threshold`, skipped keys and values propagated: each `every`-th batch to the end.

    The other batches go to the last exit with `all_rows`, else nowhere. Who leaves at the first exit, and what it says,
    is known from full depth, for exits change nothing in front of it.
    """
    view, first = full_depth.view, full_depth.view.reach[0] >= threshold
    stays = len(view.reach)
    exits = np.where(first, 0, stays)
    wrong = first & ~view.agrees[0]
    losses = None if every is None else _known(full_depth)
    mode = np.zeros(0) if losses is None else np.where(first, losses.at_exits[0], losses.full)
    ended = np.zeros(len(exits), dtype=bool)
    start = 0
    for place, group in enumerate(full_depth.groups):
        own = slice(start, start + group.tokens)
        to_the_end = every is not None and place % every == 0
        ended[own] = to_the_end
        top = full_depth.tops[place]

        def note(
            number: int,
            at: Tensor,
            logits: Tensor,
            start: int = start,
            top: Tensor = top,
            targets: Tensor = group.targets,
        ) -> None:
            places = start + at.cpu().numpy()
            if number < stays:
                exits[places] = number
                wrong[places] = (logits.argmax(-1) != top[at]).cpu().numpy()
            if losses is not None:
                mode[places] = nll_of(logits, targets[at]).double().cpu().numpy()

        if to_the_end or all_rows:
            entry = full_depth.entries[place]
            known = torch.from_numpy(first[own]).to(entry.device)
            wanted = None if losses is None else torch.from_numpy(losses.scored[own]).to(entry.device)
            model.with_exits(group, threshold, entry, note, to_the_end=to_the_end, first=known, wanted=wanted)
        start = own.stop
        advance(group.tokens)
    left = exits < stays
    by_exit = np.bincount(exits, minlength=stays + 1)[:-1]
    increase = None
    if losses is not None:
        seen = replace(losses, scored=losses.scored & ended)
        increase = seen.counts(mode, left, view.text_block, view.blocks)
    return _Seen(
        ExitCounts(
            np.bincount(view.text_block[left], minlength=view.blocks).astype(np.float64),
            np.bincount(view.text_block[wrong], minlength=view.blocks).astype(np.float64),
            int(view.may_leave.sum()),
        ),
        tuple(int(number) for number in by_exit),
        increase,
    )


def _known(full_depth: FullDepthPass) -> TokenLosses:
    if full_depth.losses is None:
        raise ValueError("the NLL increase was asked of a full-depth pass that measured no losses")
    return full_depth.losses
