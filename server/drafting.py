"""When a sequence of the verified mode drafts: proposes tokens cheaply for the deep stages to confirm.

A draft costs a shallow pass where it is wrong and saves the fixed part of a deep pass where it is right, so whether it
pays is a question of the stages' costs on this machine, of how often drafts were right for this very request, and of
how sure the exit is of this very token. None of it changes what is generated, only when.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Final, Protocol

from exeunt.server.lookup import LookUp
from exeunt.server.stage_costs import DraftCosts

LOOKUP: Final = -1  # in place of a stage: the token was looked up in the text, no stage proposed it
MOST_LOOKED_UP: Final = 7  # tokens proposed at once
_PATIENCE: Final = 16  # asks before the exit's drafts are given up where they do not pay
_FIRST_PAUSE: Final = 64  # tokens until they are tried again; doubles each time they did not pay
_LONGEST_PAUSE: Final = 1024
_MEMORY: Final = 0.95  # what the outcome of an ask is worth after each later one
_ENOUGH_ASKS: Final = (1.0 - _MEMORY**_PATIENCE) / (1.0 - _MEMORY)  # what so many weigh together
_SURE_ENOUGH: Final = 0.99  # a gate that would have to be surer than this is not asked


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
        """The next step's proposal: `tokens` end in `drafted` drafts; at most `room` more are of use."""
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


@dataclass(slots=True)
class AdaptiveDrafter:
    """Drafts as long as it pays, by the costs as they stand and by how this request's drafts have fared.

    Right, an exit's draft saves the fixed cost of a deep pass; wrong, it costs the shallow pass behind it and its
    place in the deep one. So a gate is asked for the confidence at which the two balance, W / (S + W), and no longer
    when what the asks have brought is less than they cost; after a pause it is tried again. What was looked up costs
    its places in one full pass, and is taken where that promises more.
    """

    costs: Callable[[], DraftCosts]
    looked_up: LookUp = field(default_factory=LookUp)
    _gain: float = 0.0  # weighted mean of what an ask brought, seconds
    _asks: float = 0.0
    _pause: int = _FIRST_PAUSE
    _silent_until: int = 0  # tokens

    def propose(self, tokens: Items[int], drafted: int, room: int) -> Proposal:
        costs = self.costs()
        if not costs.seen:  # a first pass goes all the way
            return Proposal()
        found = self.looked_up.find(tokens, drafted, min(room, MOST_LOOKED_UP))
        length, gain = self.looked_up.best_length(len(found), _step(costs), costs.shallow_token + costs.token)
        asks = len(tokens) >= self._silent_until
        if length and gain > (self._gain if asks and self._asks else 0.0):
            return Proposal(tokens=found[:length])
        threshold = _break_even(costs)
        if not asks or threshold > _SURE_ENOUGH:
            return Proposal()
        self._note_ask(-costs.gate, len(tokens))
        return Proposal(threshold=threshold)

    def settled(self, stages: Items[int], accepted: int) -> None:
        costs = self.costs()
        for index, stage in enumerate(stages[: accepted + 1]):
            right = index < accepted
            if stage == LOOKUP:
                self.looked_up.judged(right)
            else:
                brought = costs.deep if right else -_loss(costs)
                self._gain += brought / max(self._asks, 1.0)

    def _note_ask(self, gain: float, place: int) -> None:
        self._asks = self._asks * _MEMORY + 1.0
        self._gain += (gain - self._gain) / self._asks
        if self._asks < _ENOUGH_ASKS:
            return
        if self._gain > 0.0:
            self._pause = _FIRST_PAUSE
        else:
            self._silent_until = place + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._asks = self._gain = 0.0


def _step(costs: DraftCosts) -> float:
    """Seconds of a step that drafts nothing."""
    return costs.shallow + costs.deep + costs.token


def _loss(costs: DraftCosts) -> float:
    """Seconds that a wrong draft costs: the shallow pass behind it, and a place in the deep one."""
    return costs.shallow + costs.token


def _break_even(costs: DraftCosts) -> float:
    """The confidence at which an exit's draft neither costs nor saves."""
    loss = _loss(costs)
    return loss / (costs.deep + loss) if costs.deep + loss > 0.0 else 1.0
