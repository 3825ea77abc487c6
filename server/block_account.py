"""What an answer cost in blocks: executed for its tokens, skipped for good, or wasted. Plain data, no torch."""

from typing import Protocol

from exeunt.server.request import DepthTotals
from exeunt.server.sequence import Sequence


class WorkMetrics(Protocol):
    """Where the same events are counted for all answers together."""

    def work(self, *, executed: int = 0, skipped: int = 0, wasted: int = 0, passes: int = 0) -> None:
        """Count block × token pairs run for tokens, never run, or run in vain, and block × pass pairs."""
        ...

    def drafts(self, proposed: int, accepted: int) -> None:
        """Count tokens that were proposed for confirmation, and those of them that were confirmed."""
        ...


class BlockAccount:
    """Sorts every block × token pair that was run for one answer; the metrics hear of each once.

    In the verified mode what was run is open until the full model has judged the drafts: as many tokens count as
    executed as became certain. In the other modes all that is run is executed once its pass ends, unless it repeats
    what was run before a preemption dropped it. What was never run of the tokens of an answer is skipped, known at the
    latest when it ends.
    """

    def __init__(self, totals: DepthTotals, metrics: WorkMetrics) -> None:
        self._totals, self._metrics = totals, metrics
        self._open = 0  # pairs run for tokens that are not certain yet

    def ran(self, sequence: Sequence, pairs: int, passes: int, *, stop: int, ended: bool) -> None:
        """A pass of the answer's sequence up to the position `stop` ran so many pairs, and took part in so many blocks.

        It may go on, where it has not `ended`. What is computed anew after a preemption is told of once all of it is.
        """
        self._totals.block_passes += passes
        self._open += pairs
        repeats = sequence.preemptions and sequence.prefilling and sequence.left_at
        if repeats and ended and stop >= sequence.prefill_target:
            self._settle_pairs(min(self._open, self._owed(sequence)), passes)
        elif ended and not repeats and sequence.exits.mode != "verified":
            self._settle_pairs(self._open, passes)
        else:
            self._metrics.work(passes=passes)

    def _owed(self, sequence: Sequence) -> int:
        """Pairs of the answer's tokens that have not been run yet, nor skipped for good.

        Where a preemption came before tokens that left were caught up with, computing anew is what does it.
        """
        totals = self._totals
        return max(0, sequence.generated * totals.blocks - totals.blocks_executed - totals.blocks_skipped)

    def beside(self, blocks: int) -> None:
        """So many blocks were run for one token and not for the answer: an audit, or a step that nobody needed."""
        if blocks:
            self._totals.blocks_wasted += blocks
            self._totals.block_passes += blocks
            self._metrics.work(wasted=blocks, passes=blocks)

    def yielded(self) -> None:
        """What was run has yielded a token, though its pass may go on: it was not in vain."""
        if self._open:
            self._settle_pairs(self._open)

    def confirm(self) -> None:
        """One more token became certain by what was run since the last `settle`."""
        executed = self._totals.blocks
        self._totals.blocks_executed += executed
        self._open -= executed
        self._metrics.work(executed=executed)

    def settle(self) -> None:
        """What was run and confirmed nothing was in vain."""
        self._settle_pairs(0)

    def _settle_pairs(self, executed: int, passes: int = 0) -> None:
        """Of the open pairs so many were executed, the rest in vain; `passes` are told of along with them."""
        wasted, self._open = self._open - executed, 0
        self._totals.blocks_executed += executed
        self._totals.blocks_wasted += wasted
        self._metrics.work(executed=executed, wasted=wasted, passes=passes)

    def emitted(self, sequence: Sequence, depth: int) -> None:
        """A token left at `depth`; where keys and values are propagated, the blocks behind it are skipped for good."""
        if sequence.replays_exits and depth < self._totals.blocks:
            self._skip(self._totals.blocks - depth)

    def _skip(self, pairs: int) -> None:
        self._totals.blocks_skipped += pairs
        self._metrics.work(skipped=pairs)

    def judged(self, proposed: int, accepted: int) -> None:
        """The full model has judged drafts."""
        self._totals.drafts += proposed
        self._totals.drafts_accepted += accepted
        self._metrics.drafts(proposed, accepted)

    def close(self, tokens: int) -> None:
        """The answer has ended with so many tokens."""
        self.settle()
        totals = self._totals
        # of an answer that failed between a pass and its token more was run than its tokens say
        self._skip(max(0, tokens * totals.blocks - totals.blocks_executed - totals.blocks_skipped))
