"""A drafter whose faults end its drafting and nothing else. Plain Python, no torch.

Drafts never change an answer, so none can be missed.
"""

import logging
from collections.abc import Sequence as Items

from exeunt.server.drafting import Drafter, Proposal

log = logging.getLogger("exeunt.engine")


class TolerantDrafter:
    """Does as `drafter` does until that raises or proposes nonsense; from then on it drafts nothing."""

    def __init__(self, drafter: Drafter, name: str, vocab_size: int) -> None:
        """`name` is that of the sequence, for the log."""
        self._drafter: Drafter | None = drafter
        self._name, self._vocab_size = name, vocab_size

    def propose(self, tokens: Items[int], drafted: int, room: int) -> Proposal:
        """What the drafter proposes (see `Drafter`); nothing, and the model's own end, once it has failed."""
        if self._drafter is None:
            return Proposal()
        try:
            return self._checked(self._drafter.propose(tokens, drafted, room))
        except Exception as error:  # noqa: BLE001 - whatever it is, the answer does not need it
            self._give_up(error)
            return Proposal()

    def settled(self, stages: Items[int], accepted: int) -> None:
        """Tell the drafter what became of its drafts, unless it has failed."""
        if self._drafter is None:
            return
        try:
            self._drafter.settled(stages, accepted)
        except Exception as error:  # noqa: BLE001 - as above
            self._give_up(error)

    def at_stake(self, tokens: Items[int], drafted: int, rows: int) -> float:
        """What waiting for the next token is worth (see `Drafter`): nothing, once the drafter has failed."""
        if self._drafter is None:
            return 0.0
        try:
            return _seconds(self._drafter.at_stake(tokens, drafted, rows))
        except Exception as error:  # noqa: BLE001 - as above
            self._give_up(error)
            return 0.0

    def _checked(self, proposal: Proposal) -> Proposal:
        """Raises ValueError where a token is none of the model's, TypeError where it is no proposal."""
        if not isinstance(proposal, Proposal):
            raise TypeError(f"{proposal!r} was proposed, which is no Proposal")
        if not all(0 <= token < self._vocab_size for token in proposal.tokens):
            raise ValueError(f"tokens {proposal.tokens} were proposed, of a vocabulary of {self._vocab_size}")
        return proposal

    def _give_up(self, error: Exception) -> None:
        self._drafter = None
        log.error("%s is drafted for no more: its drafter has failed", self._name, exc_info=error)


def _seconds(at_stake: float) -> float:
    """Raises TypeError where that is no number, ValueError where it is none of seconds."""
    if not at_stake >= 0.0:
        raise ValueError(f"{at_stake!r} is said to be at stake, which is no number of seconds")
    return at_stake
