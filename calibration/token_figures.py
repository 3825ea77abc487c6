"""What is read off logits token by token: surprise, divergence from the reference, the top token.

Logits are made in pieces that a processor's cache holds, and everything is read off a piece while it is there: over a
vocabulary of thousands that is several times faster than one tensor of all logits after another.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from exeunt.calibration.teacher_forcing import logit_rows

Head = Callable[[Tensor], Tensor]
"""Maps states [K, H] to logits [K, V] float32."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The reference's distributions over the tokens of one batch, and what is needed of them.

    KL(reference ‖ mode) = Σ p log p − Σ p log q is `certainty` less Σ p × logits, plus the log-sum-exp of the mode's
    logits: the mode's own logarithms are never written down.
    """

    head: Head
    final: Tensor  # [T, H], the reference's states behind the last block
    vocab_size: int
    kept: (
        Tensor | None
    )  # [T, V] float32, rows of tokens that are not scored are zero; None: made anew when asked for
    certainty: Tensor  # [T] float32, Σ p × the reference's own logits, less their log-sum-exp: Σ p log p
    top: Tensor  # [T] int64

    def probabilities(self, tokens: Tensor) -> Tensor:
        """The distributions over `tokens` [K] int64, of those that are scored: [K, V] float32."""
        return _likely(self.head(self.final[tokens]))[0] if self.kept is None else self.kept[tokens]


@dataclass(frozen=True, slots=True)
class TokenFigures:
    """Figures of T tokens, of which those that were never given hold zeros."""

    nll: Tensor  # [T] float32, nats; 0 where no token follows
    kl: Tensor  # [T] float32, nats, against the reference
    top: Tensor  # [T] int64

    @classmethod
    def empty(cls, tokens: int, device: torch.device) -> "TokenFigures":
        """Room for `tokens` tokens."""
        return cls(
            torch.zeros(tokens, device=device),
            torch.zeros(tokens, device=device),
            torch.zeros(tokens, dtype=torch.int64, device=device),
        )

    def note(self, tokens: Tensor, logits: Tensor, targets: Tensor, reference: Reference) -> None:
        """Read the figures of `tokens` [K] int64 off their `logits` [K, V]. `targets` [T] is -1 where none follows."""
        wanted = targets[tokens]
        total = logits.logsumexp(-1)
        chosen = logits.gather(1, wanted.clamp(min=0)[:, None]).squeeze(1)
        self.nll[tokens] = torch.where(wanted >= 0, total - chosen, 0.0)
        expected = torch.linalg.vecdot(reference.probabilities(tokens), logits)
        self.kl[tokens] = reference.certainty[tokens] - (expected - total)
        self.top[tokens] = logits.argmax(-1)


def pieces(tokens: Tensor, vocab_size: int) -> Iterator[Tensor]:
    """`tokens` [K] in pieces whose logits are made at once."""
    rows = logit_rows(vocab_size, tokens.device)
    return (tokens[start : start + rows] for start in range(0, len(tokens), rows))


def reference_of(
    head: Head, final: Tensor, scored: Tensor, vocab_size: int, *, keep: bool = True
) -> Reference:
    """The reference's distributions, from its states `final` [T, H]; `scored` [T] bool says of which tokens.

    Without `keep` they are not held, [T, V], but made from the states whenever a piece of them is needed: one more
    product with the output matrix, for batches whose width does not depend on the vocabulary.
    """
    kept = torch.zeros(len(final), vocab_size, device=final.device) if keep else None
    certainty = torch.zeros(len(final), device=final.device)
    top = torch.zeros(len(final), dtype=torch.int64, device=final.device)
    for tokens in pieces(scored.nonzero().squeeze(1), vocab_size):
        logits = head(final[tokens])
        likely, total = _likely(logits)
        certainty[tokens] = torch.linalg.vecdot(likely, logits) - total
        top[tokens] = logits.argmax(-1)
        if kept is not None:
            kept[tokens] = likely
    return Reference(head, final, vocab_size, kept, certainty, top)


def _likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [K, V], and the logits' log-sum-exp [K]."""
    total = logits.logsumexp(-1)
    return (logits - total[:, None]).exp_(), total


def figures_of(
    head: Head, states: Tensor, tokens: Tensor, targets: Tensor, reference: Reference
) -> TokenFigures:
    """The figures of `tokens` [K] int64 under `head`, from the `states` [T, H] of all; the others' are zero."""
    figures = TokenFigures.empty(len(states), states.device)
    for part in pieces(tokens, reference.vocab_size):
        figures.note(part, head(states[part]), targets, reference)
    return figures
