"""Exit heads: a norm and an adapter in front of the model's own output matrix, trained to say what full depth says.

Cross-entropy to the full model's own top token beats matching its distribution ("Variance Is Not Importance", arXiv
2604.20682, section on early exits). The adapter starts from zero, which is the model's own head applied early, or from
the ridge map of the exit's normalised state onto the last block's (a tuned lens, arXiv 2303.08112, in closed form),
whichever agrees more on the select split; training stops where agreement there is best.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.compression.exits import ExitNorm
from exeunt.kernels.exit_gate.reference import adapted_state_reference

Project = Callable[[Tensor], Tensor]
"""States [T, H] to logits [T, V] float32, differentiable in the states."""


@dataclass(frozen=True, slots=True)
class HeadTraining:
    """How long and how fast heads are trained. `visits` are tokens seen in training, with repetition."""

    visits: int = 24_000
    batch_tokens: int = 512
    learning_rate: float = 1e-3
    evaluations: int = 6  # of agreement on the select split while training
    select_tokens: int = 8_000  # the most of them that early stopping looks at
    most_epochs: float = 4.0


@dataclass(frozen=True, slots=True)
class Labelled:
    """Hidden states after a block and the full model's top token there."""

    hidden: Tensor  # [T, H] in the model's dtype
    top: Tensor  # [T] int64

    @property
    def tokens(self) -> int:
        """T, the tokens."""
        return int(self.hidden.shape[0])

    def rows(self, index: Tensor | slice, device: torch.device | None = None) -> "Labelled":
        """Some of the tokens, on `device` where given."""
        hidden, top = self.hidden[index], self.top[index]
        return Labelled(hidden, top) if device is None else Labelled(hidden.to(device), top.to(device))


@dataclass(frozen=True, slots=True)
class TrainedHead:
    """A head in float32 and its agreement with full depth on the select split, by start and after training."""

    norm: ExitNorm
    adapter: Tensor  # [H, H]
    untrained_agreement: float
    ridge_agreement: float
    agreement: float


def head_state(norm: ExitNorm, adapter: Tensor, hidden: Tensor) -> Tensor:
    """n + A n with n = norm(hidden): what the output matrix is applied to. [T, H] in the adapter's dtype.

    Gradients reach the norm's weight and the adapter, unlike through the kernels that serve.
    """
    return adapted_state_reference(hidden.to(adapter.dtype), (norm.weight, norm.bias, norm.eps), adapter)


@torch.no_grad()
def head_agreement(
    norm: ExitNorm, adapter: Tensor, data: Labelled, project: Project, chunk: int = 2048
) -> float:
    """Share of `data`'s tokens on which the head's top token is the full model's."""
    agreed = 0
    for start in range(0, data.tokens, chunk):
        part = data.rows(slice(start, start + chunk), adapter.device)
        agreed += int((project(head_state(norm, adapter, part.hidden)).argmax(-1) == part.top).sum())
    return agreed / max(1, data.tokens)


def train_head(
    norm: ExitNorm,
    ridge: Tensor,
    fit: Labelled,
    select: Labelled,
    project: Project,
    training: HeadTraining,
    generator: torch.Generator,
    advance: Callable[[int], None] = lambda _tokens: None,
) -> TrainedHead:
    """A head for the hidden states of `fit`, stopped where it agrees most with `select`.

    `norm` is the model's final one in float32, `ridge` [H, H] maps its output here to what that still lacks of
    the last block's. `advance` is told the tokens trained on; they sum to `planned_visits`.
    """
    seen = select.rows(slice(0, training.select_tokens))
    starts = (torch.zeros_like(ridge, dtype=torch.float32), ridge.float())
    untrained, linear = (head_agreement(norm, start, seen, project) for start in starts)
    best = (max(untrained, linear), norm, starts[int(linear > untrained)])
    adapter = best[2].clone().requires_grad_()
    scale = norm.weight.clone().requires_grad_()
    live = replace(norm, weight=scale)
    steps = max(1, planned_visits(fit.tokens, training) // training.batch_tokens)
    optimizer = torch.optim.Adam([adapter, scale], lr=training.learning_rate)
    every = max(1, steps // training.evaluations)
    for step, rows in enumerate(_batches(fit.tokens, training.batch_tokens, steps, generator), 1):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * _rate(step, steps)
        part = fit.rows(rows, adapter.device)
        state = head_state(live, adapter, part.hidden)
        loss = F.cross_entropy(project(state), part.top)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        advance(len(rows))
        if step % every == 0 or step == steps:
            now = replace(norm, weight=scale.detach().clone())
            agreement = head_agreement(now, adapter, seen, project)
            if agreement > best[0]:
                best = (agreement, now, adapter.detach().clone())
    return TrainedHead(best[1], best[2], untrained, linear, best[0])


def planned_visits(tokens: int, training: HeadTraining) -> int:
    """Tokens that training looks at, given `tokens` to train on: whole batches, at most `most_epochs` rounds."""
    batch = training.batch_tokens
    return max(1, min(training.visits, int(training.most_epochs * tokens)) // batch) * batch


def _batches(tokens: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers of `steps` batches of at most `size`, every row once before any comes again."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat((order, torch.randperm(tokens, generator=generator)))
        yield order[:size]
        order = order[size:]


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step: a short warm-up, then a cosine to zero."""
    warm = max(1, steps // 20)
    if step <= warm:
        return step / warm
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
