"""Learn then Test over thresholds: the search behind every certificate, whatever its risk.

Thresholds are tested from strict to loose at level 1 - confidence, and the first that fails ends the sequence
(Angelopoulos et al., arXiv 2110.01052, fixed-sequence testing): the chance that any threshold called safe is not stays
below that level, however many were tried. Where the sequence begins is fixed beforehand, on other data.
"""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Outcome(Protocol):
    """What testing one threshold gave."""

    @property
    def certified(self) -> bool:
        """Whether it passed."""
        ...


Seen = TypeVar("Seen", contravariant=True)
Found = TypeVar("Found", bound=Outcome)


class FixedSequence(Generic[Seen, Found]):
    """One target's sequence: takes thresholds from strict to loose, one after another, with what was seen at each."""

    def __init__(self, begin: float, judge: Callable[[float, Seen], Found], untested: Found) -> None:
        """`begin` is the threshold at which testing begins, fixed on other data; stricter ones are passed over.

        `judge` tests one threshold; `untested` is the outcome where none was tested.
        """
        self._begin = begin
        self._judge = judge
        self._untested = untested
        self._passed: Found | None = None
        self._failed: Found | None = None

    @property
    def open(self) -> bool:
        """Whether a looser threshold may still be tested."""
        return self._failed is None

    def wants(self, threshold: float) -> bool:
        """Whether testing `threshold` next would do anything."""
        return self.open and threshold <= self._begin

    def test(self, threshold: float, seen: Seen) -> None:
        """Test one threshold, looser than those before it; does nothing once a test has failed."""
        if not self.wants(threshold):
            return
        outcome = self._judge(threshold, seen)
        if outcome.certified:
            self._passed = outcome
        else:
            self._failed = outcome

    @property
    def certificate(self) -> Found:
        """The loosest threshold that passed; else why the first one failed."""
        return self._passed or self._failed or self._untested
