"""Exit heads: a norm and an adapter in front of the model's own output matrix, trained to say what full depth says.

Two losses: cross-entropy to the full model's own top token, and the divergence from its whole distribution. The first
teaches the head how likely it is to agree, which is what a gate must know, but learns few tokens by heart; the second
generalises, but teaches how sure the full model is of the text. ("Variance Is Not Importance", arXiv 2604.20682,
compares them by agreement, `exeunt.calibration.loss_comparison` by what may leave.) Half of each, as in distillation
with hard and soft labels (arXiv 1503.02531), does what both do, and is what heads are trained by.

The adapter starts from zero, which is the model's own head applied early, or from the ridge map of the exit's
normalised state onto the last block's (a tuned lens, arXiv 2303.08112, in closed form).

Starts and stops are judged by selective agreement on the select split: agreement among the surest share of the tokens,
averaged over all shares. A head that agrees no more often but knows better when is worth more, and agreement alone does
not see it. The rate of learning stays up while that rises, and falls where it does not any more or the tokens run out
(a constant rate with a cool-down serves any length of training: arXiv 2405.18392).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exeunt.calibration.selective import selective_agreement
from exeunt.calibration.teacher_forcing import LEAST_LOGIT_ROWS, logit_rows
from exeunt.compression.exits import ExitNorm
from exeunt.kernels.exit_gate.reference import adapted_state_reference

Project = Callable[[Tensor], Tensor]
"""States [T, H] to logits [T, V] float32, differentiable in the states."""
Loss = Literal["top token", "distribution", "both"]
Start = Literal["own head", "ridge"]

WARM_UP: Final = 0.05
COOL_DOWN: Final = 0.3
"""Shares of the planned steps over which the rate rises at the beginning and falls to zero at the end."""
SLOWER: Final = 0.3
SLOWEST: Final = 0.05
"""What the rate is multiplied by where agreement has stopped rising, and below what share of it training ends."""
RECENT: Final = 8.0
"""Weights are averaged over about the last steps / RECENT: what a falling rate would give, at any time (polynomial
averaging, Shamir and Zhang, arXiv 1212.1824)."""


@dataclass(frozen=True, slots=True)
class HeadTraining:
    """How long and how fast heads are trained. `visits` are tokens seen in training, with repetition.

    Where selective agreement on the select split has not risen for `patience` of the `evaluations` that the visits are
    divided by, training goes on from its best at a lower rate, and ends where that does not help any more either. With
    few tokens a head learns them by heart, so that it is held back towards its start, the less the more tokens there
    are (a prior's weight, as in maximum a posteriori estimates).
    """

    visits: int = 20_000
    batch_tokens: int = 256
    learning_rate: float = 3e-3
    evaluations: int = 8
    patience: int = 2
    select_tokens: int = 4_000  # the most of them that evaluations look at
    most_epochs: float = 4.0
    anchor_tokens: int = 130_000  # what the start counts for, against the tokens trained on


@dataclass(frozen=True, slots=True)
class Labelled:
    """Hidden states after a block and the full model's top token there."""

    hidden: Tensor  # [T, H] in the model's dtype
    top: Tensor  # [T] int64
    final: Tensor | None = None  # [T, H] behind the last block, where the whole distribution is wanted

    @property
    def tokens(self) -> int:
        """T, the tokens."""
        return int(self.hidden.shape[0])

    def rows(self, index: Tensor | slice, device: torch.device | None = None) -> "Labelled":
        """Some of the tokens, on `device` where given."""
        hidden, top = self.hidden[index], self.top[index]
        final = None if self.final is None else self.final[index]
        if device is None:
            return Labelled(hidden, top, final)
        return Labelled(hidden.to(device), top.to(device), None if final is None else final.to(device))


@dataclass(frozen=True, slots=True)
class Agreement:
    """How often a head's top token is full depth's: of all tokens, and averaged over the surest shares of them."""

    all: float
    selective: float


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Agreement on the select split after so many tokens seen in training."""

    visits: int
    agreement: float
    selective: float


@dataclass(frozen=True, slots=True)
class TrainedHead:
    """A head in float32 and its agreement with full depth on the select split, by start and after training."""

    norm: ExitNorm
    adapter: Tensor  # [H, H]
    untrained_agreement: float
    ridge_agreement: float
    agreement: float
    selective: float = 0.0  # what it was kept for
    start: Start = "own head"
    loss: Loss = "top token"
    curve: tuple[CurvePoint, ...] = ()  # the start first
    stopped_early: bool = False
    tokens: int = 0  # of the select split, that agreement is of

    @property
    def visits(self) -> int:
        """Tokens seen in training, with repetition."""
        return self.curve[-1].visits if self.curve else 0

    @property
    def still_rising(self) -> bool:
        """Whether training ended with its visits, the last look at the head having been the best."""
        before = [point.selective for point in self.curve[:-1]]
        return bool(before) and not self.stopped_early and self.curve[-1].selective > max(before)


def head_state(norm: ExitNorm, adapter: Tensor, hidden: Tensor) -> Tensor:
    """n + A n with n = norm(hidden): what the output matrix is applied to. [T, H] in the adapter's dtype.

    Gradients reach the norm's weight and the adapter, unlike through the kernels that serve.
    """
    return adapted_state_reference(hidden.to(adapter.dtype), (norm.weight, norm.bias, norm.eps), adapter)


@torch.no_grad()
def head_logits(
    norm: ExitNorm, adapter: Tensor, data: Labelled, project: Project
) -> Iterator[tuple[Labelled, Tensor, Tensor]]:
    """`data` in pieces: tokens on the adapter's device, their states [T, H] and their logits [T, V] float32.

    As few at once as do not read the output matrix too often: logits that stay in a CPU's cache are cheap to read.
    """
    start, rows = 0, LEAST_LOGIT_ROWS  # until the first logits show how many a row has
    while start < data.tokens:
        part = data.rows(slice(start, start + rows), adapter.device)
        state = head_state(norm, adapter, part.hidden)
        logits = project(state).float()
        yield part, state, logits
        start, rows = start + rows, logit_rows(logits.shape[1], logits.device)


@torch.no_grad()
def head_sureness(
    norm: ExitNorm, adapter: Tensor, data: Labelled, project: Project
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The logarithm of the head's top probability for each token of `data`, and whether it is the full model's."""
    sure, agrees = [], []
    for part, _, logits in head_logits(norm, adapter, data, project):
        most = logits.max(-1)
        sure.append((most.values - logits.logsumexp(-1)).cpu())
        agrees.append((most.indices == part.top).cpu())
    return torch.cat(sure).numpy(), torch.cat(agrees).numpy()


def head_agreement(norm: ExitNorm, adapter: Tensor, data: Labelled, project: Project) -> Agreement:
    """How often, and how knowingly, the head's top token is the full model's on `data`."""
    sure, agrees = head_sureness(norm, adapter, data, project)
    return Agreement(float(agrees.mean()), selective_agreement(sure, agrees))


def train_head(
    norm: ExitNorm,
    ridge: Tensor,
    fit: Labelled,
    select: Labelled,
    project: Project,
    training: HeadTraining,
    generator: torch.Generator,
    advance: Callable[[int], None] = lambda _tokens: None,
    loss: Loss = "top token",
) -> TrainedHead:
    """A head for the hidden states of `fit`, kept where its selective agreement with `select` is highest.

    `norm` is the model's final one in float32, `ridge` [H, H] maps its output here to what that still lacks of
    the last block's. But for the `loss` "top token" `fit` must have the last block's states, which `norm` and `project`
    turn into the distribution to match. `advance` is told the tokens trained on, and in the end those that early
    stopping spares; they sum to `planned_visits`.
    """
    seen = select.rows(slice(0, training.select_tokens))
    starts = (torch.zeros_like(ridge, dtype=torch.float32), ridge.float())
    found = [head_agreement(norm, start, seen, project) for start in starts]
    linear = found[1].selective > found[0].selective
    live = _Live(norm, starts[int(linear)], training, fit.tokens)
    best = _Best(found[int(linear)], norm, starts[int(linear)])
    curve = [CurvePoint(0, best.found.all, best.found.selective)]
    planned = planned_visits(fit.tokens, training)
    course = _Course(max(1, planned // training.batch_tokens), training)
    for rows in _batches(fit.tokens, training.batch_tokens, course.planned, generator):
        rate = course.step()
        part = fit.rows(rows, ridge.device)
        logits = project(head_state(live.norm, live.adapter, part.hidden))
        live.step(logits, loss_slope(logits.detach(), part, project, norm, loss), rate)
        advance(len(rows))
        if course.judged:
            now = live.head()
            agreement = head_agreement(*now, seen, project)
            curve.append(CurvePoint(course.taken * training.batch_tokens, agreement.all, agreement.selective))
            risen = agreement.selective > best.found.selective
            best = _Best(agreement, *now) if risen else best
            if course.stalls(risen):
                live.go_back(best.norm, best.adapter)
            if course.stopped:
                break
    advance(planned - course.taken * training.batch_tokens)
    return TrainedHead(
        best.norm,
        best.adapter,
        untrained_agreement=found[0].all,
        ridge_agreement=found[1].all,
        agreement=best.found.all,
        selective=best.found.selective,
        start="ridge" if linear else "own head",
        loss=loss,
        curve=tuple(curve),
        stopped_early=course.stopped,
        tokens=seen.tokens,
    )


def planned_visits(tokens: int, training: HeadTraining) -> int:
    """Tokens that training looks at, given `tokens` to train on: whole batches, at most `most_epochs` rounds."""
    batch = training.batch_tokens
    return max(1, min(training.visits, int(training.most_epochs * tokens)) // batch) * batch


@dataclass(frozen=True, slots=True)
class _Best:
    found: Agreement
    norm: ExitNorm
    adapter: Tensor


class _Live:
    """The head while it is trained."""

    def __init__(self, norm: ExitNorm, start: Tensor, training: HeadTraining, tokens: int) -> None:
        self._norm, self._start, self._training = norm, start, training
        self._pull = training.anchor_tokens / tokens
        self.adapter = start.clone().requires_grad_()
        self.scale = norm.weight.clone().requires_grad_()
        self.norm = replace(norm, weight=self.scale)
        self._mean = (start.clone(), norm.weight.clone())
        self._steps = 0
        self._optimizer = torch.optim.Adam([self.adapter, self.scale], fused=True)

    def step(self, logits: Tensor, slope: Tensor, share: float) -> None:
        """Go one step against `slope`, the loss's gradient by `logits`, at `share` of the learning rate."""
        rate = self._training.learning_rate * share
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        logits.backward(slope)  # type: ignore[no-untyped-call]
        self._optimizer.step()
        with torch.no_grad():  # weight decay (decoupled: arXiv 1711.05101), but towards the start
            pulled = min(1.0, self._pull * rate)
            self.adapter.lerp_(self._start, pulled)
            self.scale.lerp_(self._norm.weight, pulled)
            self._steps += 1
            recent = min(1.0, RECENT / self._steps)
            for mean, now in zip(self._mean, (self.adapter, self.scale), strict=True):
                mean.lerp_(now, recent)

    def head(self) -> tuple[ExitNorm, Tensor]:
        """Norm and adapter, averaged over the last steps."""
        adapter, scale = self._mean
        return replace(self._norm, weight=scale.clone()), adapter.clone()

    @torch.no_grad()
    def go_back(self, norm: ExitNorm, adapter: Tensor) -> None:
        """Go on from the weights of `norm` and `adapter`."""
        self.scale.copy_(norm.weight)
        self.adapter.copy_(adapter)
        self._mean = (adapter.clone(), norm.weight.clone())


@dataclass(slots=True)
class _Course:
    """Where training stands between its first step and its last, and how fast it goes."""

    planned: int  # steps
    training: HeadTraining
    taken: int = 0
    stopped: bool = False
    _rate: float = 1.0  # share of the learning rate
    _stale: int = 0  # evaluations since the last rise

    def step(self) -> float:
        """Begin the next step; its share of the learning rate."""
        self.taken += 1
        warm = max(1, round(WARM_UP * self.planned))
        cool = max(1, round(COOL_DOWN * self.planned))
        return self._rate * min(1.0, self.taken / warm, (self.planned + 1 - self.taken) / cool)

    @property
    def judged(self) -> bool:
        """Whether agreement is looked at after this step."""
        every = max(1, self.planned // self.training.evaluations)
        return self.taken % every == 0 or self.taken == self.planned

    def stalls(self, risen: bool) -> bool:
        """Count an evaluation: whether agreement has stopped rising, so that training slows down or ends."""
        self._stale = 0 if risen else self._stale + 1
        if self._stale < self.training.patience:
            return False
        self._stale, self._rate = 0, self._rate * SLOWER
        self.stopped = self._rate < SLOWEST
        return True


@torch.no_grad()
def loss_slope(logits: Tensor, part: Labelled, project: Project, norm: ExitNorm, loss: Loss) -> Tensor:
    """The gradient of a batch's mean loss by its logits [T, V]: that of a cross-entropy is softmax less what is wanted.

    Written down because one pass over the vocabulary then serves both parts of the loss.
    """
    slope = logits.softmax(-1)
    of_top = {"top token": 1.0, "both": 0.5, "distribution": 0.0}[loss]
    if of_top < 1.0:
        if part.final is None:
            raise ValueError(f"the loss is {loss!r}, and the data has no states of the last block")
        slope -= (1.0 - of_top) * project(norm(part.final.float())).float().softmax(-1)
    slope[torch.arange(part.tokens, device=slope.device), part.top] -= of_top
    return slope.div_(part.tokens)


def _batches(tokens: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers of `steps` batches of at most `size`, every row once before any comes again."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat((order, torch.randperm(tokens, generator=generator)))
        yield order[:size]
        order = order[size:]
