"""Drafters that learn nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

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

    def at_stake(self, tokens: Sequence[int], drafted: int, rows: int) -> float:
        """It is always to be asked."""
        return math.inf


@dataclass(slots=True)
class RestingDrafter:
    """Drafts nothing, and says what is at stake all the same."""

    seconds: float = 0.0
    asked: list[int] = field(default_factory=list)  # behind how many tokens it was asked for that

    def propose(self, tokens: Sequence[int], drafted: int, room: int) -> Proposal:
        """Go on to the model's end."""
        return Proposal()

    def settled(self, stages: Sequence[int], accepted: int) -> None:
        """There is nothing to be settled."""
        assert (list(stages), accepted) == ([], 0)

    def at_stake(self, tokens: Sequence[int], drafted: int, rows: int) -> float:
        """As was set."""
        self.asked.append(len(tokens))
        return self.seconds
