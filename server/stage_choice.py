"""Which stage of a variant runs next: a batch that has gathered well, and nobody waits too long. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

SchedulingPolicy = Literal["run-through", "queues"]
"""run-through: a tick runs all stages, rows dropping out where they leave. queues: it runs one stage, and the next one
is chosen by what has gathered where."""

_MARGIN: Final = (
    0.05  # of what running both would cost: by less a shallower stage does not go before a deeper one
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

    A row that has waited for `longest_wait` seconds, or would while all other stages run first, has its stage run, the
    longest waiting first. Else the stage runs that wastes least: with c(n) = `cost(stage, n)` seconds for n rows and
    N = `everyone`, n rows run now waste c(n) - n c(N) / N over what they would cost with all rows together. Where
    weights are read from memory c hardly grows with n, and a small deep batch waits for company; where arithmetic
    decides, each row costs the same and nothing is gained by waiting: then a pass that has begun is finished first.
    (The simulation in docs/simulation.md compares this with other rules.)
    """
    costs = {queue.stage: cost(queue.stage, queue.rows) for queue in queues}
    total = sum(costs.values())
    due = [queue for queue in queues if now - queue.oldest + total - costs[queue.stage] >= longest_wait]
    if due:
        return min(due, key=lambda queue: queue.oldest).stage
    waste = {q.stage: costs[q.stage] - q.rows * cost(q.stage, everyone) / everyone for q in queues}
    best = max(waste)
    for stage in sorted(waste, reverse=True):
        if waste[best] - waste[stage] > _MARGIN * (costs[best] + costs[stage]):
            best = stage
    return best
