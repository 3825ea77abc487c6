"""When a sequence of the verified mode drafts: proposes tokens cheaply for the deep stages to confirm.

A draft costs a shallow pass where it is wrong and saves a deep pass where it is right, so whether it pays is a
question of the stages' costs on this machine, of how often drafts were right for this very request, and of how sure
the exit is of this very token. None of it changes what is generated, only when.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Final, Protocol

from exeunt.server.request import GenerationRequest

LOOKUP: Final = -1  # in place of a stage: the token was looked up in the text, no stage proposed it


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a drafter wants for the next step: tokens to try at once, or a gate to ask.

    `tokens` are drafts that no stage proposed. `threshold` is the confidence at which the drafting exit's token is a
    draft; None asks no gate, and the step goes to the model's end with whatever waits for confirmation.
    """

    tokens: tuple[int, ...] = ()
    threshold: float | None = None


class Drafter(Protocol):
    """Says for each step of one sequence what to draft, and is told what became of it."""

    def propose(self, tokens: Items[int], drafted: int, room: int) -> Proposal:
        """The next step's proposal: `tokens` end in `drafted` drafts, `room` more could be confirmed or needed."""
        ...

    def settled(self, stages: Items[int], accepted: int) -> None:
        """The drafts of these stages were judged: the first `accepted` were right."""
        ...


@dataclass(frozen=True, slots=True)
class FixedDrafter:
    """Drafts where the exit is at least so sure, at most so many in a row."""

    threshold: float = 0.6
    most: int = 4

    def propose(self, tokens: Items[int], drafted: int, room: int) -> Proposal:
        return Proposal(threshold=self.threshold if drafted < self.most and room > 0 else None)

    def settled(self, stages: Items[int], accepted: int) -> None:
        """Nothing is learned."""


def default_drafter(_request: GenerationRequest) -> Drafter:
    """What an engine drafts with."""
    return FixedDrafter()
