"""When a sequence of the verified mode drafts: proposes tokens cheaply for the deep stages to confirm.

A draft costs a shallow pass where it is wrong and saves the fixed part of a deep pass where it is right, so whether it
pays is a question of the stages' costs on this machine, of how often drafts were right for this very request, and of
how sure the exit is of this very token. None of it changes what is generated, only when. Plain Python, no torch.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from exeunt.server.lookup import LookUp
from exeunt.server.stage_costs import DraftCosts

LOOKUP: Final = -1  # in place of a stage: the token was looked up in the text, no stage proposed it
MOST_LOOKED_UP: Final = 7  # tokens proposed at once
_PATIENCE: Final = 16  # asks before the exit's drafts are given up where they do not pay
_FIRST_PAUSE: Final = 64  # ticks until they are tried again; doubles each time they did not pay
_LONGEST_PAUSE: Final = 1 << 13
_MEMORY: Final = 0.95  # what the outcome of an ask is worth after each later one
_ENOUGH_ASKS: Final = (1.0 - _MEMORY**_PATIENCE) / (1.0 - _MEMORY)  # what so many weigh together
_UNASKED: Final = 64  # ticks after which an exit that has paid is asked again, whatever a head start gains
_SURE_ENOUGH: Final = 0.99  # a gate that would have to be surer than this is not asked


class Proposal(NamedTuple):
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
        """The model's end was reached: of the drafts of these stages, perhaps none, the first `accepted` were right."""
        ...

    def at_stake(self, tokens: Items[int], drafted: int, rows: int) -> float:
        """Seconds that drafts are expected to save this sequence in a step of so many `rows`, whatever comes next.

        It is what a step loses that is begun ahead, before its token is known, and therefore drafts nothing. Infinite
        where drafts must be tried to tell. `tokens` end in `drafted` drafts. Asked twice of the same tokens it says the
        same.
        """
        ...


@dataclass(slots=True)
class ExitWorth:
    """Whether asking the drafting exit pays, learned from all answers of a variant together.

    A batch that asks for one of its rows stops for all of them, so it is tried, given up and tried again in common.
    """

    gain: float = 0.0  # weighted mean of what an ask brought, seconds
    _asks: float = 0.0
    _ticks: int = 0
    _last_ask: int = 0
    _silent_until: int = 0
    _pause: int = _FIRST_PAUSE

    def ticked(self) -> None:
        """A tick of the engine has passed."""
        self._ticks += 1

    def may_ask(self) -> bool:
        """Whether the exit is to be asked at present."""
        return self._ticks >= self._silent_until

    def asked(self) -> None:
        """The exit is asked in this tick."""
        self._last_ask = self._ticks

    @property
    def overdue(self) -> bool:
        """Whether it was not asked for so long that what asks bring may have changed."""
        return self._ticks - self._last_ask > _UNASKED

    @property
    def known(self) -> bool:
        """Whether so many asks were judged that `gain` can be relied on."""
        return self._asks >= _ENOUGH_ASKS

    def judged(self, asks: int, seconds: float) -> None:
        """What became of so many asks is known: together they saved so much, or cost it."""
        for _ in range(asks):
            self._asks = self._asks * _MEMORY + 1.0
            self.gain += (seconds / asks - self.gain) / self._asks
        if not self.known:
            return
        if self.gain > 0.0:
            self._pause = _FIRST_PAUSE
        else:
            self._silent_until = self._ticks + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._asks = self.gain = 0.0


@dataclass(slots=True)
class AdaptiveDrafter:
    """Drafts as long as it pays, by the costs as they stand and by how drafts have fared.

    Right, an exit's draft saves the fixed cost of a deep pass; wrong, it costs the shallow pass behind it and its
    place in the deep one. So a gate is asked for the confidence at which the two balance, W / (S + W), raised where
    this request's drafts were right less often than that, and not at all while asking does not pay. What was looked up
    costs its places in one full pass, and is taken where that promises more.
    """

    costs: Callable[[], DraftCosts]
    worth: ExitWorth = field(default_factory=ExitWorth)
    ahead: Callable[[int], float | None] | None = None  # a row's share of a step of so many, begun ahead
    looked_up: LookUp = field(default_factory=LookUp)
    _right: float = 0.0
    _judged: float = 0.0
    _open_asks: int = 0  # since drafts were judged last
    _stake: tuple[int, float] = (0, 0.0)  # what was at stake last, and behind how many tokens
    _due: bool = False  # the exit is to be asked, whatever could be looked up

    def propose(self, tokens: Items[int], drafted: int, room: int) -> Proposal:
        """The look-up where that promises more than the exit, else the gate's threshold, else nothing (see `Drafter`).

        A gate that is asked counts as an open ask until `settled`; a first pass, whose costs are not known, goes deep.
        """
        costs = self.costs()
        if not costs.seen:  # a first pass goes all the way
            return Proposal()
        asks = self.worth.may_ask()
        due, self._due = self._due and asks, False
        step, each = _step(costs), _each(costs)
        if not due and self.looked_up.pays(step, each):  # else it is not worth looking
            found = self.looked_up.find(tokens, drafted, min(room, MOST_LOOKED_UP))
            length, gain = self.looked_up.best_length(len(found), step, each)
            if length and gain > (self.worth.gain if asks else 0.0):
                self.looked_up.tried()
                return Proposal(tokens=found[:length])
        if not asks or (threshold := self._threshold(costs)) > _SURE_ENOUGH:
            return Proposal()
        self._open_asks += 1
        self.worth.asked()
        return Proposal(threshold=threshold)

    def settled(self, stages: Items[int], accepted: int) -> None:
        """Learn from the drafts up to the first wrong one: how often each kind is right here, and what asks saved."""
        if not stages and not self._open_asks:  # as most often
            return
        costs = self.costs()
        saved = 0.0
        for index, stage in enumerate(stages[: accepted + 1]):
            right = index < accepted
            if stage == LOOKUP:
                self.looked_up.judged(right)
            else:
                self._right = self._right * _MEMORY + right
                self._judged = self._judged * _MEMORY + 1.0
                saved += costs.deep if right else -_loss(costs)
        if self._open_asks:
            self.worth.judged(self._open_asks, saved - self._open_asks * costs.gate)
            self._open_asks = 0

    def at_stake(self, tokens: Items[int], drafted: int, rows: int) -> float:
        """What the better of the two drafts is expected to save (see `Drafter`); behind drafts what it was before them.

        Look-ups are judged by the text as it comes, tried or not; the exit only where it is asked, which is therefore
        to be done now and then.
        """
        if not drafted and self._stake[0] != len(tokens):
            self._stake = (len(tokens), self._at_stake(tokens, rows, self.costs()))
        stake = self._stake[1]
        tried = drafted and math.isinf(stake) and self.worth.known
        return self._of_exit(rows) if tried else stake

    def _at_stake(self, tokens: Items[int], rows: int, costs: DraftCosts) -> float:
        if not costs.seen:  # then nothing is proposed either
            return 0.0
        ahead = None if self.ahead is None else self.ahead(rows)
        step = _step(costs) if ahead is None else ahead
        found = self.looked_up.promise(tokens, MOST_LOOKED_UP, step, _each(costs))
        if not self.worth.may_ask() or self._threshold(costs) > _SURE_ENOUGH:
            return found
        if not self.worth.known or self.worth.overdue:
            self._due = True
            return math.inf
        return max(found, self._of_exit(rows))

    def _of_exit(self, rows: int) -> float:
        """What asking the exit is expected to save: less in a batch, whose deep pass runs as long as one row stays."""
        return self.worth.gain / rows

    def _threshold(self, costs: DraftCosts) -> float:
        """The confidence to ask for: 1 - doubt, the doubt shrunk where this request's drafts fared worse than that."""
        balance = _break_even(costs)
        right = (self._right + 4.0 * balance) / (
            self._judged + 4.0
        )  # at first it is taken to be right often enough
        return balance if right >= balance else 1.0 - (1.0 - balance) * right / balance


def _step(costs: DraftCosts) -> float:
    """Seconds of a step that drafts nothing."""
    return costs.shallow + costs.deep + costs.token


def _each(costs: DraftCosts) -> float:
    """Seconds that one more token costs in a step that goes all the way."""
    return costs.shallow_token + costs.token


def _loss(costs: DraftCosts) -> float:
    """Seconds that a wrong draft costs: the shallow pass behind it, and a place in the deep one."""
    return costs.shallow + costs.token


def _break_even(costs: DraftCosts) -> float:
    """The confidence at which an exit's draft neither costs nor saves."""
    loss = _loss(costs)
    return loss / (costs.deep + loss) if costs.deep + loss > 0.0 else 1.0
