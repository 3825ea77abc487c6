"""Drafts from the text itself: what followed the last time the same tokens stood there. Plain Python, no torch.

Known as prompt look-up decoding: texts that quote, list or repeat continue as before, and a guess costs no model time.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Final

LENGTHS: Final = (4, 3, 2)  # tokens that must have stood there, the longest match first
_FORGETTING: Final = 0.97  # what an outcome is worth after each later one
_INDEXED_AT_ONCE: Final = 512  # tokens: a long prompt is taken in over some steps and holds nobody up
_CAUTION: Final = 1.2  # what a token tried is taken to cost, over what was measured: estimates err both ways
_PRIOR_RIGHT, _PRIOR_ALL = 1.0, 2.0  # at first every second guess is taken to be right


@dataclass(slots=True)
class LookUp:
    """Where every short run of a sequence's tokens was last seen, and how often its continuation was right."""

    _places: dict[tuple[int, ...], int] = field(default_factory=dict)  # the place behind the run
    _known: int = 0  # tokens indexed
    _right: float = 0.0
    _all: float = 0.0
    _found: float = 0.0
    _sought: float = 0.0
    _foreseen: tuple[int, int] | None = None  # a place in the text, and what a look-up would have put there

    @property
    def acceptance(self) -> float:
        """The probability that a guess is right, those before it being so."""
        return (self._right + _PRIOR_RIGHT) / (self._all + _PRIOR_ALL)

    def find(self, tokens: Items[int], drafted: int, most: int) -> tuple[int, ...]:
        """Up to `most` tokens that followed the last time; `tokens` end in `drafted` tokens not certain yet."""
        self._index(tokens, len(tokens) - drafted)
        for length in LENGTHS:
            if len(tokens) >= length:
                place = self._places.get(tuple(tokens[-length:]))
                if place is not None and place < len(tokens) - drafted:
                    return tuple(tokens[place : min(place + most, len(tokens) - drafted)])
        return ()

    def pays(self, step: float, each: float) -> bool:
        """Whether trying a token that is found saves more than it costs (see `best_length`)."""
        return self.acceptance * step > each * _CAUTION

    def best_length(self, available: int, step: float, each: float) -> tuple[int, float]:
        """How many of the tokens found to try, and the seconds expected to be saved by it.

        A step takes `step` seconds and each token tried with it `each` more; n tokens of acceptance a bring
        1 + a + … + aⁿ (Leviathan, Kalman and Matias 2023, equation 1).
        """
        best, saved, acceptance = 0, 0.0, self.acceptance
        bring, power = 1.0, 1.0
        for count in range(1, available + 1):
            power *= acceptance
            bring += power
            gain = bring * step - (step + count * each * _CAUTION)
            if gain > saved:
                best, saved = count, gain
        return best, saved

    def promise(self, tokens: Items[int], most: int, step: float, each: float) -> float:
        """Seconds that looking up is expected to save a step of this text (see `best_length`).

        It goes by how often something was found and how often that was right, were it tried or not: each call notes
        what would follow `tokens`, all of them certain, and compares what the one before noted.
        """
        if self._foreseen is not None and self._foreseen[0] == len(tokens) - 1:
            self.judged(self._foreseen[1] == tokens[-1])
        found = self.find(tokens, 0, 1)
        self._foreseen = (len(tokens), found[0]) if found else None
        self._found = self._found * _FORGETTING + bool(found)
        self._sought = self._sought * _FORGETTING + 1.0
        often = (self._found + _PRIOR_RIGHT) / (self._sought + _PRIOR_ALL)
        return often * self.best_length(most, step, each)[1]

    def tried(self) -> None:
        """What was found is tried, and will be judged by what comes of it."""
        self._foreseen = None

    def judged(self, right: bool) -> None:
        """A token that was looked up and tried was right, or wrong."""
        self._right = self._right * _FORGETTING + right
        self._all = self._all * _FORGETTING + 1.0

    def _index(self, tokens: Items[int], certain: int) -> None:
        """Take in the certain tokens that are new; the last one's runs wait until something follows them."""
        certain = min(certain, self._known + _INDEXED_AT_ONCE)
        for end in range(max(self._known, 1), certain):
            for length in LENGTHS:
                if end >= length:
                    self._places[tuple(tokens[end - length : end])] = end
        self._known = max(self._known, certain)
