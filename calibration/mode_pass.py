"""What every mode of a variant makes of one batch: which exit each token leaves at, and what is said there.

All modes of a variant share one pass at full depth and one look of every gate and exit head at its states. With
backfill that is all there is to know, for any number of thresholds. With propagated keys and values the look at the
first exit holds too, for nothing has left in front of it; what lies behind is a pass of its own for every threshold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exeunt.calibration.compute import Passage
from exeunt.calibration.evaluation_table import Mode
from exeunt.calibration.exit_training import Labelled
from exeunt.calibration.scored_text import ScoredBatch
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.calibration.thresholds import gate_reach
from exeunt.calibration.token_figures import Reference, TokenFigures, figures_of, pieces

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ExitLook:
    """What an exit made of the batch's tokens at full depth. A row's first token reaches nothing: it never leaves."""

    reach: Tensor  # [T] float32, the largest threshold at which the token leaves
    looked: Tensor  # [T] float32, the largest at which it is looked at
    whole: Tensor  # [T] float32, the largest at which it is projected onto the whole vocabulary
    figures: TokenFigures  # of the scored tokens that leave at the least threshold looked at


@dataclass(frozen=True, slots=True)
class VariantPass:
    """A variant's batch at full depth. `states` are by depth: behind every exit, and behind the last block."""

    states: Mapping[int, Tensor]  # [T, H] each
    full: TokenFigures
    looks: tuple[ExitLook, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a mode made of the batch's tokens: where they went, and what was said of those that are scored."""

    passage: Passage
    nll: Floats  # [T]
    kl: Floats  # [T]
    agreed: NDArray[np.bool_]  # [T], with the reference's top token
    wrong: NDArray[np.bool_]  # [T], left early with another top token than the variant's own at full depth


@torch.inference_mode()
def variant_pass(
    model: ForcedModel,
    batch: ScoredBatch,
    states: Mapping[int, Tensor],
    reference: Reference,
    least: float | None,
    base: VariantPass | None = None,
) -> VariantPass:
    """The figures of full depth and of every exit, down to the threshold `least` (None: exits are not looked at).

    What exits made of states that are those of `base` is taken from there.
    """
    scored = batch.scored.nonzero().squeeze(1)
    full = figures_of(model.decoder.head, states[model.blocks], scored, batch.batch.targets, reference)
    looks: list[ExitLook] = []
    for number, head in enumerate(model.exits if least is not None else ()):
        if base is not None and len(base.looks) > number and states[head.depth] is base.states[head.depth]:
            looks.append(base.looks[number])
        else:
            looks.append(_look(model, number, states[head.depth], batch, reference, least or 0.0))
    return VariantPass(states, full, tuple(looks))


def _look(
    model: ForcedModel, number: int, hidden: Tensor, batch: ScoredBatch, reference: Reference, least: float
) -> ExitLook:
    head, project = model.exits[number], model.decoder.project_exit
    vocab = model.decoder.spec.vocab_size
    reach, looked, whole = (torch.full((len(hidden),), -1.0, device=hidden.device) for _ in range(3))
    may_leave = (batch.batch.positions > 0).nonzero().squeeze(1)
    for part in pieces(may_leave, vocab):
        reach[part], looked[part], whole[part], _ = gate_reach(
            head, Labelled(hidden[part], reference.top[part]), project, least
        )
    gone = ((reach >= least) & batch.scored).nonzero().squeeze(1)
    figures = figures_of(
        lambda states: project(head.read(states)[0]), hidden, gone, batch.batch.targets, reference
    )
    return ExitLook(reach, looked, whole, figures)


@torch.inference_mode()
def mode_outcome(
    model: ForcedModel, batch: ScoredBatch, mode: Mode, passed: VariantPass, reference: Reference
) -> Outcome:
    """What `mode` makes of `batch`, whose pass at full depth is `passed`."""
    walk = _Walk(model, batch, passed)
    if mode.threshold is not None and model.exits:
        if mode.skipped_kv == "backfill":
            walk.backfilled(mode.threshold)
        else:
            walk.propagated(mode.threshold, reference)
    figures, top = walk.figures, walk.figures.top
    left = walk.left < len(model.exits)
    return Outcome(
        walk.passage(),
        _host(figures.nll.double()),
        _host(figures.kl.double()),
        _host(top == reference.top),
        _host(left & (top != passed.full.top)),
    )


class _Walk:
    """A batch on its way out: nobody has left yet, and what is said is what full depth says."""

    def __init__(self, model: ForcedModel, batch: ScoredBatch, passed: VariantPass) -> None:
        tokens, device = batch.batch.tokens, batch.batch.positions.device
        full, exits = passed.full, len(model.exits)
        self._model, self._batch, self._passed = model, batch, passed
        self._may_leave = batch.batch.positions > 0
        self.figures = TokenFigures(full.nll.clone(), full.kl.clone(), full.top.clone())
        self.left = torch.full((tokens,), exits, device=device)
        self.asked = torch.zeros(exits, tokens, dtype=torch.bool, device=device)
        self.looked, self.whole = torch.zeros_like(self.asked), torch.zeros_like(self.asked)

    def passage(self) -> Passage:
        """How the batch's tokens went so far."""
        steps = (self.left, self.asked, self.looked, self.whole)
        return Passage(_host(self._batch.batch.positions), *map(_host, steps))

    def backfilled(self, threshold: float) -> None:
        """Let tokens leave at the first exit that they reach."""
        for number in range(len(self._passed.looks)):
            self._leave(number, threshold)

    def propagated(self, threshold: float, reference: Reference) -> None:
        """Let tokens leave at the first exit, and run the rest past what they left behind."""
        batch, model, targets = self._batch, self._model, self._batch.batch.targets

        def said(number: int, tokens: Tensor, logits: Tensor) -> None:
            self.left[tokens] = number
            counts = batch.scored[tokens]
            if bool(counts.all()):
                self.figures.note(tokens, logits, targets, reference)
            elif bool(counts.any()):
                self.figures.note(tokens[counts], logits[counts], targets, reference)

        def asked(number: int, tokens: Tensor, looked: Tensor, whole: Tensor) -> None:
            self.asked[number, tokens] = self._may_leave[tokens]
            self.looked[number, tokens] = looked
            self.whole[number, tokens] = whole

        first = self._leave(0, threshold)
        entry = self._passed.states[model.depth(0)]
        model.with_exits(batch.batch, threshold, entry, said, first=first, asked=asked, wanted=batch.scored)

    def _leave(self, number: int, threshold: float) -> Tensor:
        """Who leaves at an exit of those that are still there: [T] bool."""
        look, limit = self._passed.looks[number], torch.tensor(threshold)
        asked = (self.left == len(self._model.exits)) & self._may_leave
        leaves = asked & (look.reach >= limit)
        self.left[leaves] = number
        self.asked[number] = asked
        self.looked[number] = asked & (look.looked >= limit)
        self.whole[number] = asked & (look.whole >= limit)
        for own, there in zip(_fields(self.figures), _fields(look.figures), strict=True):
            own[leaves] = there[leaves]
        return leaves


def _fields(figures: TokenFigures) -> Sequence[Tensor]:
    return figures.nll, figures.kl, figures.top


def _host(tensor: Tensor) -> NDArray[Any]:
    return tensor.cpu().numpy()
