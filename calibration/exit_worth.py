"""What an exit saves as its gate is set: by this a shortlist's size, and how strict it is, are chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from torch import Tensor

from exeunt.calibration.exit_choice import ExitCosts
from exeunt.calibration.selective import share_within
from exeunt.calibration.thresholds import past

WORTH: Final = 0.01
"""The share of the blocks by which savings count as equal: by as much measured costs differ from one time to the next.
Of equals what computes least is kept."""
LIST_RATIOS: Final = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.2, 0.0)
"""How strict a shortlist may be: what it must say of a token is this share of what all logits must."""


@dataclass(frozen=True, slots=True)
class ExitWorth:
    """What leaving behind an exit saves, and what finding out who may costs."""

    depth: int  # blocks passed by a token that leaves there
    blocks: int  # of the model
    costs: ExitCosts  # of looks at the shortlist in question
    targets: Sequence[float]  # risks

    def saving(self, reach: Tensor, looked: Tensor, whole: Tensor, agrees: Tensor) -> float:
        """The share of the blocks that the exit alone saves, net, averaged over the targets.

        As many tokens leave, surest first, as keep the risk on these. A target that loses counts against the others,
        unlike among sets of exits: how a gate is set holds for all targets. By token [T]: `reach`, `looked` and
        `whole` are the largest thresholds at which it leaves, is looked at, and is projected onto the whole vocabulary.
        """
        sure, right = reach.double().cpu().numpy(), agrees.cpu().numpy()
        steps = [each.double().cpu().numpy() for each in (looked, whole)]
        gains = []
        for target in self.targets:
            leaving = share_within(sure, right, target)
            threshold = np.sort(sure)[::-1][round(leaving * len(sure)) - 1] if leaving > 0 else np.inf
            seen, confirmed = (float((each >= threshold).mean()) for each in steps)
            saved = leaving * (
                (self.blocks - self.depth) * (1.0 - self.costs.skipped_kv) - self.costs.leaving
            )
            saved -= self.costs.gate + (seen - leaving) * self.costs.projection
            gains.append((saved - (confirmed - leaving) * self.costs.whole) / self.blocks)
        return float(np.mean(gains))


@dataclass(frozen=True, slots=True)
class Confidences:
    """What the steps of a gate say of T tokens, [T] float32 each, and whether leaving is right, [T] bool."""

    screened: Tensor  # the largest threshold at which the probe lets a token pass
    listed: Tensor  # the confidence by the shortlist
    confirmed: Tensor  # that by all logits
    agrees: Tensor

    def whole(self, ratio: float) -> Tensor:
        """The largest threshold [T] at which all logits are asked, of a shortlist as strict as `ratio`."""
        return past(self.listed, ratio).minimum(self.screened)

    def reach(self, ratio: float) -> Tensor:
        """The largest threshold [T] at which a token leaves."""
        return self.confirmed.minimum(self.whole(ratio))

    def thresholds(self, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """The largest thresholds [T] at which a token leaves, is looked at, and is projected onto the vocabulary."""
        return self.reach(ratio), self.screened, self.whole(ratio)


def choose_list_ratio(found: Confidences, worth: ExitWorth) -> tuple[float, float]:
    """How strict the shortlist is to be, of `LIST_RATIOS`, and what the exit then saves.

    A strict one turns away tokens that might have left, a lax one lets many pass in vain: the strictest is taken that
    saves as much as any within `WORTH`.
    """
    savings = {ratio: worth.saving(*found.thresholds(ratio), found.agrees) for ratio in LIST_RATIOS}
    most = max(savings.values())
    return next((ratio, saving) for ratio, saving in savings.items() if most - saving <= WORTH)
