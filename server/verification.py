"""Which drafts the full model confirms: plain data, no torch."""

from collections.abc import Sequence as Items
from typing import NamedTuple


class Draw(NamedTuple):
    """A sampled token: its id, its log-probability under the raw logits, and the stage at whose end it left.

    `position` is that of the pass it follows from: the token stands at `position` + 1.
    """

    token: int
    logprob: float
    stage: int
    position: int
    error: str | None = None  # why no token could be chosen


def confirmed_draws(drafts: Items[int], stages: Items[int], truths: Items[Draw]) -> tuple[list[Draw], int]:
    """Return what is now certain, in order, and how many of the drafts were right.

    `drafts` are the proposed tokens, `stages` who proposed them, `truths` what the full model draws in their places and
    behind the last, each from a history that contains the drafts before it. So a truth counts as long as all drafts
    before it were right: the first that differs replaces its draft, and what follows it is void. A confirmed draft
    names the stage that proposed it, with the full model's log-probability.
    """
    certain: list[Draw] = []
    for index, truth in enumerate(truths):
        if index < len(drafts) and truth.token == drafts[index]:
            certain.append(truth._replace(stage=stages[index]))
        else:
            return [*certain, truth], index
    return certain, len(certain)
