"""What it costs the server's own scheduler to put a tick together: choose a stage, make its rows, find them pages."""

import time
from typing import Final

import numpy as np

from exeunt.compression.variant import Variant
from exeunt.server.pages import PagePool, PageTable
from exeunt.server.request import ExitPolicy
from exeunt.server.row import Row
from exeunt.server.scheduler import Scheduler
from exeunt.server.sequence import Sequence
from exeunt.server.stages import StagePlan

ROWS: Final = (256, 2048)
_TICKS: Final = 300
_PAGE_TOKENS: Final = 16
_EXITS: Final = ExitPolicy("approximate", threshold=0.5)


def tick_costs(ticks: int = _TICKS) -> dict[str, dict[str, float]]:
    """Median and 90th percentile of `Scheduler.next_tick` in microseconds, by the number of rows that it takes."""
    return {str(rows): _tick_cost(rows, ticks) for rows in ROWS}


def _tick_cost(rows: int, ticks: int) -> dict[str, float]:
    pool = PagePool(rows * (2 + ticks // _PAGE_TOKENS))
    scheduler = Scheduler(
        StagePlan(8, (3,)), pool, max_num_seqs=rows, max_num_batched_tokens=rows, policy="queues"
    )
    for number in range(rows):
        table = PageTable(pool, _PAGE_TOKENS)
        scheduler.add(Sequence(str(number), Variant(), _EXITS, [1], 1, table))
    taken_us = []
    for _ in range(ticks):
        start = time.perf_counter()
        tick = scheduler.next_tick()
        passed = time.perf_counter() - start
        if tick is None:
            break
        if len(tick.rows) == rows:
            taken_us.append(1e6 * passed)
        for row in tick.rows:
            _leave(row, scheduler)
    p50, p90 = np.quantile(taken_us, (0.5, 0.9))
    return {"p50_us": round(float(p50), 1), "p90_us": round(float(p90), 1)}


def _leave(row: Row, scheduler: Scheduler) -> None:
    """Its token leaves at the exit, keys and values propagated."""
    sequence = row.sequence
    sequence.computed = row.stop
    sequence.tokens.append(1)
    sequence.left_at.append(0)
    scheduler.finish_pass(sequence)
