"""A drafter that learns nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from exeunt.server.drafting import Proposal


@dataclass(frozen=True, slots=True)
class FixedDrafter:
    """Drafts where the exit is at least so sure, at most so many in a row."""

    threshold: float = 0.6
    most: int = 4

    def propose(self, tokens: Sequence[int], drafted: int, room: int) -> Proposal:
        """Ask the gate until so many drafts stand in a row."""
        return Proposal(threshold=self.threshold if drafted < self.most and room > 0 else None)

    def settled(self, stages: Sequence[int], accepted: int) -> None:
        """Nothing is learned."""

    def at_stake(self, tokens: Sequence[int]) -> float:
        """It is always to be asked."""
        return math.inf
