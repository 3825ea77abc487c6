"""Cross-entropy to the full model's own top token against the divergence from its whole distribution, at one exit.

The heads, one of each loss and one of both, saw the same tokens in the same order from the same start. What counts is
not only how often a head agrees: one that was taught the top token says with its own top probability how likely it is
to agree, one that was taught the distribution how sure the full model is of the text; the first can let more tokens go
at the same risk even where the second agrees more often.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exeunt.calibration.exit_training import Labelled, Loss, Project, TrainedHead, head_sureness
from exeunt.calibration.selective import selective_agreement, share_within
from exeunt.compression.exits import ExitNorm


@dataclass(frozen=True, slots=True)
class LossOutcome:
    """A head on the whole select split."""

    agreement: float  # of all tokens
    selective: float  # averaged over the surest shares of them
    leaving: tuple[float, ...]  # share that may leave at each risk, the head's own top probability deciding
    visits: int  # tokens seen in training, with repetition


@dataclass(frozen=True, slots=True)
class LossComparison:
    """The start of one exit's head, what each loss and half of both made of it, and the loss whose head serves."""

    block: int
    tokens: int  # that all are judged on
    risks: tuple[float, ...]
    start: LossOutcome
    top_token: LossOutcome
    distribution: LossOutcome
    served: Loss
    both: LossOutcome | None = None


def compare_losses(
    block: int,
    heads: Mapping[Loss, TrainedHead],
    norm: ExitNorm,
    ridge: Tensor,
    select: Labelled,
    project: Project,
    risks: Sequence[float],
) -> tuple[TrainedHead, LossComparison]:
    """The best of `heads`, one for each loss, and how they compare.

    Best is the highest selective agreement on the tokens that training was stopped by; of equals the first. `norm` is
    the model's final one, `ridge` the other start, as in `train_head`. Choosing here is sound: certificates are made on
    a split that has no part in it.
    """
    served = max(heads.values(), key=lambda head: head.selective)
    adapter = ridge.float() if served.start == "ridge" else torch.zeros_like(ridge, dtype=torch.float32)
    outcomes = {
        loss: _outcome(head.norm, head.adapter, head.visits, select, project, risks)
        for loss, head in heads.items()
    }
    comparison = LossComparison(
        block,
        select.tokens,
        tuple(risks),
        start=_outcome(norm, adapter, 0, select, project, risks),
        top_token=outcomes["top token"],
        distribution=outcomes["distribution"],
        served=served.loss,
        both=outcomes.get("both"),
    )
    return served, comparison


def _outcome(
    norm: ExitNorm, adapter: Tensor, visits: int, select: Labelled, project: Project, risks: Sequence[float]
) -> LossOutcome:
    sure, agrees = head_sureness(norm, adapter, select, project)
    return LossOutcome(
        float(agrees.mean()),
        selective_agreement(sure, agrees),
        tuple(share_within(sure, agrees, risk) for risk in risks),
        visits,
    )
