"""Gates: the probability that an exit's top token is the full model's, and how well it separates.

A probe (a small perceptron on the head's state) and its judge (the same with the largest log-probabilities added to its
units) are trained together on tokens that the head was not trained on; a logistic regression of four weights then joins
the judge's logit with the top log-odds and the margin of the logits that decide, on the select split. What comes out is
a calibrated probability as far as the select split can tell; certificates do not rely on it.

Where looks are at a shortlist, judge and regression come twice: of the shortlist's logits, to say whom to look at
further, and of all logits, to confirm it.

How well it separates is measured on tokens that neither probe nor regression has seen: the probe's training stops by a
part of its own tokens, and of the select split each half is judged by a regression of the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.calibration.exit_training import Labelled, Project, TrainedHead, head_logits
from exeunt.calibration.exit_worth import Confidences, ExitWorth, choose_list_ratio
from exeunt.calibration.gate_quality import GateQuality as GateQuality
from exeunt.calibration.gate_quality import auc as auc
from exeunt.calibration.gate_quality import gate_quality
from exeunt.calibration.thresholds import past
from exeunt.compression.exit_output import Shortlist
from exeunt.compression.exits import ExitConfirmation, ExitHead, ExitJudge, ExitProbe
from exeunt.kernels.exit_gate.reference import (
    JudgeParts,
    ProbeParts,
    confidence_of,
    gate_features,
    judge_logit_reference,
    probe_output_reference,
    probe_units_reference,
    top_log_probabilities,
)

SCREENS: Final = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
SCREEN_RECALL: Final = 0.98
"""The probe may turn away so few of the tokens that the whole gate would let go."""
TOPS: Final = 8
"""Log-probabilities that the judge sees."""
STOPPING_SHARE: Final = 0.1
"""Of the tokens that a probe is trained on, the last, which say when to stop."""


@dataclass(frozen=True, slots=True)
class ProbeTraining:
    """How the probe and its judge are trained."""

    units: int = 64
    steps: int = 450
    batch_tokens: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 1e-1
    evaluations: int = 12


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a head makes of labelled tokens. By what decides: the logits of the shortlist, if any, then all."""

    state: Tensor  # [T, H] float32
    agrees: Tensor  # [T] bool
    tops: tuple[Tensor, ...]  # [T, K] float32 each, the largest log-probabilities
    features: tuple[
        Tensor, ...
    ]  # [T, 2] float32 each: the two features of `gate_features` that need no opinion

    def rows(self, index: slice | Tensor) -> "_Seen":
        return _Seen(
            self.state[index],
            self.agrees[index],
            tuple(each[index] for each in self.tops),
            tuple(each[index] for each in self.features),
        )


@dataclass(frozen=True, slots=True)
class _Opinion:
    """What one look at logits makes of the select split's tokens."""

    judge: JudgeParts
    combine: Tensor  # [4] float32
    sure: Tensor  # [T] float32, the confidence
    unseen: Tensor  # [T] float32, the same of each half by a regression of the other


def train_gate(
    block: int,
    head: TrainedHead,
    fit: Labelled,
    select: Labelled,
    project: Project,
    training: ProbeTraining,
    generator: torch.Generator,
    advance: Callable[[int], None] = lambda _tokens: None,
    shortlist: Shortlist | None = None,
    worth: ExitWorth | None = None,
) -> tuple[ExitHead, GateQuality]:
    """The whole exit after `block`: `head` with its probe, judge, regression and screen, and how well it separates.

    `fit` are tokens that `head` was not trained on; the quality is measured on `select`. Where there is a `shortlist`,
    its logits say whom to ask further, and all logits confirm it; how strict the list is to be is chosen by what the
    exit is `worth` then, and without that it turns away whom it would not let go itself. Agreement is that of the whole
    vocabulary in any case. `advance` is told the tokens looked at and trained on; they sum to `planned_gate_tokens`.
    """
    learned, judged = (_look(head, part, project, shortlist, advance) for part in (fit, select))
    probe, judges = _train_probe(learned, training, generator, advance)
    with torch.no_grad():
        units = probe_units_reference(judged.state, probe)
        logit = probe_output_reference(units, probe)
        opinions = [_opinion(units, judged, place, judge) for place, judge in enumerate(judges)]
    first, last = opinions[0], opinions[-1]
    screen = _screen_ratio(logit.sigmoid(), last.sure)
    listed, reach, confirmation = None, None, None
    if shortlist is not None:
        listed, screened = first.unseen, past(logit.sigmoid(), screen)
        steps = Confidences(screened, listed, last.unseen, judged.agrees)
        ratio = 1.0 if worth is None else choose_list_ratio(steps, worth)[0]
        confirmation = ExitConfirmation(ExitJudge(*last.judge), last.combine, ratio)
        reach = past(listed, ratio).minimum(last.unseen)
    exit_head = ExitHead(
        block,
        head.norm,
        head.adapter,
        ExitProbe(*probe),
        first.combine,
        screen,
        ExitJudge(*first.judge),
        shortlist,
        confirmation,
    )
    top = judged.features[-1][:, 0]
    return exit_head, gate_quality(last.unseen, logit, top, judged.agrees, listed, reach)


def _opinion(units: Tensor, seen: _Seen, place: int, judge: JudgeParts) -> _Opinion:
    """What the judge at a place among the looks makes of the tokens, given the probe's `units` [T, units]."""
    said = judge_logit_reference(units, seen.tops[place], judge)
    features = torch.cat((said[:, None], seen.features[place]), 1)
    combine = logistic_regression(features, seen.agrees)
    return _Opinion(judge, combine, confidence_of(features, combine), _cross_fitted(features, seen.agrees))


def planned_gate_tokens(fit: int, select: int, training: ProbeTraining) -> int:
    """Tokens that `train_gate` looks at and trains on, given so many in each split."""
    return fit + select + training.steps * training.batch_tokens


def _cross_fitted(features: Tensor, agrees: Tensor) -> Tensor:
    """The confidence [T] of each half of the tokens by a regression of the other: neighbours are in one half."""
    half = len(agrees) // 2
    parts = (slice(0, half), slice(half, None))
    return torch.cat(
        [
            confidence_of(features[own], logistic_regression(features[other], agrees[other]))
            for own, other in (parts, parts[::-1])
        ]
    )


def logistic_regression(features: Tensor, truth: Tensor, penalty: float = 1e-2, steps: int = 50) -> Tensor:
    """Weights [F + 1] float32 of P(truth) = sigmoid(features [T, F] · w + constant), by Newton's method in float64.

    `penalty` × |w|² / 2 on the log-likelihood of standardised features keeps weights finite where the classes
    separate.
    """
    x, y = features.double(), truth.double()
    mean, spread = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    x = torch.cat(((x - mean) / spread, torch.ones_like(x[:, :1])), 1)
    ridge = torch.full((x.shape[1],), penalty, dtype=x.dtype, device=x.device)
    weights = torch.zeros_like(ridge)

    def objective(w: Tensor) -> Tensor:
        z = x @ w
        return (F.softplus(z) - y * z).sum() + 0.5 * (ridge * w.square()).sum()

    value = objective(weights)
    for _ in range(steps):
        p = torch.sigmoid(x @ weights)
        gradient = x.T @ (p - y) + ridge * weights
        curvature = (x * (p * (1 - p))[:, None]).T @ x + torch.diag(ridge)
        move = torch.linalg.solve(curvature, gradient)
        size = 1.0
        while size > 1e-6 and objective(weights - size * move) > value:
            size /= 2  # a full Newton step may overshoot where the classes nearly separate
        weights = weights - size * move
        before, value = value, objective(weights)
        if float(before - value) <= 1e-9 * max(1.0, abs(float(before))):
            break
    slopes = weights[:-1] / spread
    return torch.cat((slopes, (weights[-1] - slopes @ mean)[None])).float()


@torch.no_grad()
def _look(
    head: TrainedHead,
    data: Labelled,
    project: Project,
    shortlist: Shortlist | None,
    advance: Callable[[int], None],
) -> _Seen:
    ids = () if shortlist is None else (shortlist.ids.to(head.adapter.device),)
    states, agrees = [], []
    tops: list[list[Tensor]] = [[] for _ in range(len(ids) + 1)]
    features: list[list[Tensor]] = [[] for _ in tops]
    for part, state, logits in head_logits(head.norm, head.adapter, data, project):
        states.append(state.float())
        agrees.append(logits.argmax(-1) == part.top)
        for place, decisive in enumerate((*(logits[:, chosen] for chosen in ids), logits)):
            tops[place].append(top_log_probabilities(decisive, min(TOPS, decisive.shape[1])))
            features[place].append(gate_features(torch.zeros_like(logits[:, 0]), decisive)[:, 1:])
        advance(part.tokens)
    return _Seen(
        torch.cat(states),
        torch.cat(agrees),
        tuple(torch.cat(each) for each in tops),
        tuple(torch.cat(each) for each in features),
    )


def _train_probe(
    seen: _Seen, training: ProbeTraining, generator: torch.Generator, advance: Callable[[int], None]
) -> tuple[ProbeParts, tuple[JudgeParts, ...]]:
    """The probe that predicts agreement from the state, and a judge for each look, stopped where they do so best.

    Their losses are added up: they share the units, of which each needs its own reading. The last `STOPPING_SHARE` of
    `seen` says when to stop.
    """
    mean, spread = seen.state.mean(0), seen.state.std(0, correction=0).clamp(min=1e-6)
    scales = [tops.std(0, correction=0).clamp(min=1e-6) for tops in seen.tops]
    centres = [tops.mean(0) for tops in seen.tops]
    tops = tuple((of - centre) / scale for of, centre, scale in zip(seen.tops, centres, scales, strict=True))
    standard = _Seen((seen.state - mean) / spread, seen.agrees, tops, seen.features)
    cut = len(seen.agrees) - int(len(seen.agrees) * STOPPING_SHARE)
    fit, stop = standard.rows(slice(0, cut)), standard.rows(slice(cut if cut < len(seen.agrees) else 0, None))
    weights = _first_weights(fit, training.units, generator)
    optimizer = torch.optim.AdamW(
        weights, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    best, kept = float("inf"), [weight.detach().clone() for weight in weights]
    every = max(1, training.steps // training.evaluations)
    for step in range(1, training.steps + 1):
        rows = torch.randint(cut, (training.batch_tokens,), generator=generator).to(fit.state.device)
        loss = _loss(weights, fit.rows(rows))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        advance(training.batch_tokens)
        if step % every == 0:
            with torch.no_grad():
                missed = float(_loss(weights, stop))
            if missed < best:
                best, kept = missed, [weight.detach().clone() for weight in weights]
    # the standardisation folded into the first layers
    first = kept[0] / spread
    probe = first, kept[1] - first @ mean, kept[2], kept[3]
    folded = []
    for (weight, bias, output, output_bias), centre, scale in zip(
        _judges(kept), centres, scales, strict=True
    ):
        own = weight / scale[:, None]
        folded.append((own, bias - centre @ own, output, output_bias))
    return probe, tuple(folded)


def _judges(weights: Sequence[Tensor]) -> list[JudgeParts]:
    """Of the weights that are trained the judges', four tensors each; the first four are the probe's."""
    return [
        (weights[start], weights[start + 1], weights[start + 2], weights[start + 3])
        for start in range(4, len(weights), 4)
    ]


def _first_weights(seen: _Seen, units: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """What the probe's four tensors and each judge's begin as: all say how many agree, and little else."""
    device, hidden = seen.state.device, seen.state.shape[1]
    share = float(seen.agrees.float().mean().clamp(1e-3, 1 - 1e-3))

    def drawn(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device)

    odds = torch.tensor(np.log(share / (1 - share)), dtype=torch.float32, device=device)
    weights: list[Tensor] = []
    for inputs in (None, *(tops.shape[1] for tops in seen.tops)):
        weights += (
            drawn(units, hidden, scale=hidden**-0.5)
            if inputs is None
            else drawn(inputs, units, scale=inputs**-0.5),
            torch.zeros(units, device=device),
            drawn(units, scale=1 / units),
            odds.clone(),
        )
    for weight in weights:
        weight.requires_grad_()
    return tuple(weights)


def _loss(weights: Sequence[Tensor], seen: _Seen) -> Tensor:
    """The cross-entropies of probe and judges, added up."""
    probe, truth = (weights[0], weights[1], weights[2], weights[3]), seen.agrees.float()
    units = probe_units_reference(seen.state, probe)
    loss = F.binary_cross_entropy_with_logits(probe_output_reference(units, probe), truth)
    for tops, judge in zip(seen.tops, _judges(weights), strict=True):
        loss = loss + F.binary_cross_entropy_with_logits(judge_logit_reference(units, tops, judge), truth)
    return loss


def _screen_ratio(probe: Tensor, confidence: Tensor) -> float:
    """The strictest screen that keeps `SCREEN_RECALL` of the tokens that leave, at every threshold that matters."""
    for ratio in SCREENS:
        kept = [
            float((probe[confidence >= threshold] >= ratio * threshold).float().mean())
            for threshold in (0.7, 0.8, 0.9, 0.95)
            if bool((confidence >= threshold).any())
        ]
        if all(share >= SCREEN_RECALL for share in kept):
            return ratio
    return 0.0
