"""Which stage runs next when rows wait at several: utilisation or waste, and a bound on how long any row waits.

A decision looks at one line per stage (how many rows and tokens wait, since when) and at predicted costs, never at
single rows: it costs the same for ten thousand rows as for ten.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Rule = Literal["fullest", "least waste"]
Cost = Callable[[int, float, float], float]  # (stage, rows, tokens) -> predicted seconds

MARGIN: Final = 0.05  # a stage goes before a deeper one if it is better by so much: gathering costs latency


@dataclass(slots=True)
class StageQueue:
    """The rows that wait at one stage, in the order in which they came, and the tokens that they bring."""

    rows: int = 0
    tokens: int = 0
    since: float = 0.0  # when the oldest came
    _waiting: list[Rows] = field(default_factory=list)

    def put(self, rows: Rows, tokens: int, now: float) -> None:
        if not len(rows):
            return
        if not self.rows:
            self.since = now
        self.rows += len(rows)
        self.tokens += tokens
        self._waiting.append(rows)

    def take(self) -> Rows:
        """All rows: a batch that may be larger is never cheaper per row when it is smaller."""
        taken = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting)
        self._waiting, self.rows, self.tokens = [], 0, 0
        return taken


@dataclass(frozen=True, slots=True)
class StagePolicy:
    """Picks the stage to run.

    `fullest` runs the stage whose rows are used best: rows × (cost of a full batch ÷ full) ÷ cost of these rows, the
    share of a full batch's efficiency that this batch has. `least waste` runs the stage where the time beyond that,
    cost of these rows − rows × (cost of a full batch ÷ full), is smallest: a half-empty run of three quarters of the
    model wastes more than one of a quarter, which a ratio does not see. A stage goes before a deeper one only if it is
    better by `MARGIN` (of the score; of what running both would cost), so that where rows cost the same in any company
    a pass that has begun is finished first.

    Whatever scores best, a stage is due when running all others first could keep its oldest row longer than
    `max_wait_s`; of the due ones the oldest goes first. Between two stages so no row waits longer than `max_wait_s`, if
    that is at least the cost of both at full batch and predictions hold.
    """

    rule: Rule
    cost: Cost
    full: int  # rows of a full batch: the sequences that run
    max_wait_s: float

    def choose(self, queues: Sequence[StageQueue], now: float) -> int:
        """The stage to run next, of those at which rows wait. ValueError if there are none."""
        costs = {s: self.cost(s, q.rows, q.tokens) for s, q in enumerate(queues) if q.rows}
        if not costs:
            raise ValueError("no stage to choose: no row waits at any of them")
        total = sum(costs.values())
        due = [s for s in costs if now - queues[s].since + total - costs[s] > self.max_wait_s]
        if due and len(costs) > 1:
            return min(due, key=lambda s: queues[s].since)
        scores = {s: self._score(s, queues[s], cost) for s, cost in costs.items()}
        best = max(scores)
        for stage in sorted(scores, reverse=True):
            scale = scores[best] if self.rule == "fullest" else costs[best] + costs[stage]
            if scores[stage] > scores[best] + MARGIN * scale:
                best = stage
        return best

    def _score(self, stage: int, queue: StageQueue, cost: float) -> float:
        share = queue.rows / self.full
        at_full = share * self.cost(stage, self.full, queue.tokens / share)
        return at_full / cost if self.rule == "fullest" else at_full - cost
