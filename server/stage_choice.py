"""Which stage of a variant runs next: a batch that has gathered well, and nobody waits too long. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

SchedulingPolicy = Literal["run-through", "queues"]
"""run-through: a tick runs all stages, rows dropping out where they leave. queues: it runs one stage, and the next one
is chosen by what has gathered where."""

_AS_GOOD: Final = (
    0.95  # of two batches used about as well the deeper one runs: a pass begun is finished first
)


@dataclass(frozen=True, slots=True)
class StageQueue:
    """Rows in front of a stage; the one that has waited longest has done so since `oldest` (any clock, seconds)."""

    stage: int
    rows: int
    oldest: float


def choose_stage(
    queues: Sequence[StageQueue],
    everyone: int,
    cost: Callable[[int, int], float],
    now: float,
    longest_wait: float,
) -> int:
    """Return the stage to run, of those with rows.

    A row that has waited for `longest_wait` seconds has its stage run first. Else the batch that is used best: with
    c(n) = `cost(stage, n)` seconds for n rows and N = `everyone`, n rows do their work at the share (c(N) / N) / (c(n)
    / n) of what it would cost each with all rows together. Where weights are read from memory c hardly grows with n,
    and a small batch waits for company; where arithmetic decides, each row costs the same and nothing is gained by
    waiting.
    """
    overdue = [queue for queue in queues if now - queue.oldest >= longest_wait]
    if overdue:
        return min(overdue, key=lambda queue: queue.oldest).stage
    used = {queue.stage: _utilisation(queue, everyone, cost) for queue in queues}
    enough = _AS_GOOD * max(used.values())
    return max(stage for stage, share in used.items() if share >= enough)


def _utilisation(queue: StageQueue, everyone: int, cost: Callable[[int, int], float]) -> float:
    alone = cost(queue.stage, queue.rows)
    if alone <= 0.0:  # not run yet: any batch is as good as another
        return 1.0
    return queue.rows * cost(queue.stage, everyone) / (everyone * alone)
