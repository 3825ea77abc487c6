"""Gates: the probability that an exit's top token is the full model's, and how well it separates.

A probe (a small perceptron on the head's state) is trained on tokens that the head was not trained on; a logistic
regression of four weights then joins its logit with the head's own top log-odds and margin, on the select split.
What comes out is a calibrated probability as far as the select split can tell; certificates do not rely on it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from exeunt.calibration.exit_training import Labelled, Project, TrainedHead, head_state
from exeunt.compression.exits import ExitHead, ExitProbe
from exeunt.kernels.exit_gate.reference import ProbeParts, confidence_of, gate_features, probe_logit_reference

SCREENS: Final = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
SCREEN_RECALL: Final = 0.98
"""The probe may turn away so few of the tokens that the whole gate would let go."""
RELIABILITY_BINS: Final = 10


@dataclass(frozen=True, slots=True)
class ProbeTraining:
    """How the probe is trained."""

    units: int = 64
    steps: int = 600
    batch_tokens: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    evaluations: int = 12


@dataclass(frozen=True, slots=True)
class GateQuality:
    """How well a gate tells agreeing tokens from others, on the split it is judged on.

    AUC is the chance that an agreeing token gets more than a disagreeing one; `reliability` holds for each
    occupied tenth of confidence (mean confidence, share that agrees, tokens).
    """

    auc: float
    auc_probe: float
    auc_top: float  # of the head's own top probability alone
    calibration_error: float  # mean distance of confidence and agreement over the tenths, weighted by tokens
    reliability: tuple[tuple[float, float, int], ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a head makes of labelled tokens."""

    state: Tensor  # [T, H] float32
    agrees: Tensor  # [T] bool
    features: Tensor  # [T, 2] float32: the two features of `gate_features` that do not need the probe


def train_gate(
    block: int,
    head: TrainedHead,
    fit: Labelled,
    select: Labelled,
    project: Project,
    training: ProbeTraining,
    generator: torch.Generator,
    advance: Callable[[int], None] = lambda _tokens: None,
) -> tuple[ExitHead, GateQuality]:
    """The whole exit after `block`: `head` with its probe, regression and screen, and how well it separates.

    `fit` are tokens that `head` was not trained on; the quality is measured on `select`. `advance` is told the tokens
    looked at and trained on; they sum to `planned_gate_tokens`.
    """
    learned, judged = (_look(head, part, project, advance) for part in (fit, select))
    probe = _train_probe(learned, judged, training, generator, advance)
    with torch.no_grad():
        logit = probe_logit_reference(judged.state, probe)
        features = torch.cat((logit[:, None], judged.features), 1)
    combine = logistic_regression(features, judged.agrees)
    confidence = confidence_of(features, combine)
    screen = _screen_ratio(logit.sigmoid(), confidence)
    exit_head = ExitHead(block, head.norm, head.adapter, ExitProbe(*probe), combine, screen)
    return exit_head, gate_quality(confidence, logit, judged.features[:, 0], judged.agrees)


def planned_gate_tokens(fit: int, select: int, training: ProbeTraining) -> int:
    """Tokens that `train_gate` looks at and trains on, given so many in each split."""
    return fit + select + training.steps * training.batch_tokens


def gate_quality(confidence: Tensor, probe_logit: Tensor, top: Tensor, agrees: Tensor) -> GateQuality:
    """The quality of a gate from [T] tensors of its confidence, its parts and the truth."""
    sure = confidence.double().cpu().numpy()
    truth = agrees.cpu().numpy()
    bins = np.minimum((sure * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
    table = [
        (float(sure[bins == b].mean()), float(truth[bins == b].mean()), int((bins == b).sum()))
        for b in range(RELIABILITY_BINS)
        if (bins == b).any()
    ]
    error = sum(count * abs(said - was) for said, was, count in table) / max(1, len(sure))
    return GateQuality(
        auc=auc(sure, truth),
        auc_probe=auc(probe_logit.double().cpu().numpy(), truth),
        auc_top=auc(top.double().cpu().numpy(), truth),
        calibration_error=error,
        reliability=tuple(table),
        tokens=len(sure),
    )


def auc(score: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """Area under the ROC curve (Mann-Whitney, ties count half); 0.5 where all agree or none does."""
    positive = int(truth.sum())
    negative = len(truth) - positive
    if positive == 0 or negative == 0:
        return 0.5
    ranks = stats.rankdata(score)
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


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
    head: TrainedHead, data: Labelled, project: Project, advance: Callable[[int], None], chunk: int = 2048
) -> _Seen:
    states, agrees, features = [], [], []
    for start in range(0, data.tokens, chunk):
        part = data.rows(slice(start, start + chunk), head.adapter.device)
        state = head_state(head.norm, head.adapter, part.hidden)
        logits = project(state).float()
        states.append(state.float())
        agrees.append(logits.argmax(-1) == part.top)
        features.append(gate_features(torch.zeros_like(logits[:, 0]), logits)[:, 1:])
        advance(part.tokens)
    return _Seen(torch.cat(states), torch.cat(agrees), torch.cat(features))


def _train_probe(
    fit: _Seen,
    select: _Seen,
    training: ProbeTraining,
    generator: torch.Generator,
    advance: Callable[[int], None],
) -> ProbeParts:
    """The probe that predicts agreement from the state, stopped where it does so best on `select`."""
    mean, spread = fit.state.mean(0), fit.state.std(0, correction=0).clamp(min=1e-6)
    inputs, hidden = (fit.state - mean) / spread, fit.state.shape[1]
    judged, truth = (select.state - mean) / spread, select.agrees.float()
    device = inputs.device
    share = float(fit.agrees.float().mean().clamp(1e-3, 1 - 1e-3))
    weights = (
        (torch.randn(training.units, hidden, generator=generator) / hidden**0.5).to(device),
        torch.zeros(training.units, device=device),
        (torch.randn(training.units, generator=generator) / training.units).to(device),
        torch.tensor(np.log(share / (1 - share)), dtype=torch.float32, device=device),
    )
    for weight in weights:
        weight.requires_grad_()
    optimizer = torch.optim.AdamW(weights, lr=training.learning_rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    best, kept = float("inf"), [weight.detach().clone() for weight in weights]
    every = max(1, training.steps // training.evaluations)
    for step in range(1, training.steps + 1):
        rows = torch.randint(len(inputs), (training.batch_tokens,), generator=generator).to(device)
        loss = F.binary_cross_entropy_with_logits(
            probe_logit_reference(inputs[rows], weights), fit.agrees[rows].float()
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        advance(training.batch_tokens)
        if step % every == 0:
            with torch.no_grad():
                missed = float(
                    F.binary_cross_entropy_with_logits(probe_logit_reference(judged, weights), truth)
                )
            if missed < best:
                best, kept = missed, [weight.detach().clone() for weight in weights]
    first = kept[0] / spread  # the standardisation folded into the first layer
    return first, kept[1] - first @ mean, kept[2], kept[3]


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
