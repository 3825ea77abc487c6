"""What each token of a text costs at every exit and at full depth: teacher-forced NLL, in nats."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exeunt.calibration.nll_risk import CLIP, NllCounts
from exeunt.calibration.teacher_forcing import logit_rows
from exeunt.compression.exits import ExitHead

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """The NLL that T tokens give to the token that follows each, as an exit says it and as full depth does.

    `at_exits` [exits, T] holds zeros where it was not asked for, `full` [T] where nothing follows. Only tokens that are
    `scored` [T] count: something follows, and they might leave, which a row's first token may not.
    """

    at_exits: Floats
    full: Floats
    scored: NDArray[np.bool_]

    def counts(
        self, mode: Floats, left: NDArray[np.bool_], where: NDArray[np.int64], blocks: int
    ) -> NllCounts:
        """The sums by block of text, `where` [T], for a mode whose NLL is `mode` [T] and that lets `left` [T] leave."""
        at = where[self.scored]
        increase = (mode - self.full)[self.scored]

        def summed(values: Floats) -> Floats:
            return np.bincount(at, weights=values, minlength=blocks).astype(np.float64)

        return NllCounts(
            clipped=summed(increase.clip(-CLIP, CLIP)),
            unclipped=summed(increase),
            full=summed(self.full[self.scored]),
            exits=summed(left[self.scored].astype(np.float64)),
            tokens=summed(np.ones(len(at))),
        )

    def left_at(self, exits: NDArray[np.int64]) -> Floats:
        """The NLL [T] of tokens that leave at `exits` [T], the number of exits for one that stays."""
        stays = exits == len(self.at_exits)
        place = np.where(stays, 0, exits)
        return np.where(stays, self.full, self.at_exits[place, np.arange(len(exits))])


def nll_of(logits: Tensor, following: Tensor) -> Tensor:
    """The NLL of the tokens `following` [K] int64 under `logits` [K, V]: [K] float32 nats, 0 where it is negative."""
    chosen = logits.gather(1, following.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(following >= 0, logits.logsumexp(-1) - chosen, 0.0)


@torch.inference_mode()
def exit_nll(
    head: ExitHead, hidden: Tensor, following: Tensor, project: Callable[[Tensor], Tensor], vocab_size: int
) -> Tensor:
    """The NLL of the tokens `following` [K] as `head` says it of states [K, H] behind its block: [K] float32 nats."""
    parts = [torch.zeros(0, device=hidden.device)]
    rows = logit_rows(vocab_size, hidden.device)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        state, _ = head.read(hidden[part])
        parts.append(nll_of(project(state).float(), following[part]))
    return torch.cat(parts)
