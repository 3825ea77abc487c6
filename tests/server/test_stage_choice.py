"""Which stage runs: full batches where that pays, nobody starved, and a decision that costs next to nothing."""

import random

from hypothesis import given
from hypothesis import strategies as st

from exeunt.compression.variant import Variant
from exeunt.server.pages import PagePool, PageTable
from exeunt.server.request import ExitPolicy
from exeunt.server.row import Row
from exeunt.server.scheduler import LEAST_CHUNK, Scheduler
from exeunt.server.sequence import Sequence
from exeunt.server.stage_choice import StageQueue, choose_stage
from exeunt.server.stage_costs import StageCosts
from exeunt.server.stages import StagePlan

FULL = Variant()


def memory_bound(_stage: int, _rows: int) -> float:
    return 1e-3


def arithmetic(_stage: int, rows: int) -> float:
    return 1e-4 * rows


def queues(*rows: int, oldest: float = 0.0) -> list[StageQueue]:
    return [StageQueue(stage, count, oldest) for stage, count in enumerate(rows) if count]


def test_a_small_deep_batch_waits_where_weights_are_read_and_runs_where_rows_are_computed() -> None:
    assert choose_stage(queues(14, 2), 16, memory_bound, 0.0, 1.0) == 0
    assert choose_stage(queues(2, 14), 16, memory_bound, 0.0, 1.0) == 1
    assert choose_stage(queues(14, 2), 16, arithmetic, 0.0, 1.0) == 1


def test_who_waited_too_long_goes_first() -> None:
    waiting = [StageQueue(0, 14, 0.9), StageQueue(1, 2, 0.5), StageQueue(2, 1, 0.4)]
    assert choose_stage(waiting, 17, memory_bound, 1.0, 10.0) == 0
    assert choose_stage(waiting, 17, memory_bound, 1.0, 0.5) == 2


def test_stages_that_never_ran_are_run_from_the_deepest() -> None:
    assert choose_stage(queues(5, 1, 1), 7, lambda stage, rows: 0.0, 0.0, 1.0) == 2


@given(
    st.integers(0, 2**16),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1e-3),
    st.integers(1, 12),
)
def test_no_row_waits_much_longer_than_it_may(seed: int, leaves: float, slope: float, rows: int) -> None:
    """Adversarial exits: whatever leaves where, a row's stage runs within the bound and the ticks before it."""
    dice, now, plan = random.Random(seed), 0.0, StagePlan(9, (1, 4))
    costs = StageCosts()
    for stage in range(plan.stages):
        for count in (1, 4):
            costs.ran(FULL, stage, count, 1e-3 + slope * count)
    scheduler = Scheduler(
        plan,
        PagePool(4096),
        max_num_seqs=rows,
        max_num_batched_tokens=rows,
        policy="queues",
        costs=costs,
        longest_wait=0.02,
        clock=lambda: now,
    )
    for i in range(rows):
        exits = ExitPolicy("approximate", threshold=0.5)
        scheduler.add(Sequence(f"{i}", FULL, exits, [1], 1, PageTable(scheduler._pool, 16)))
    waiting_since: dict[Sequence, float] = {}
    for _ in range(150):
        tick = scheduler.next_tick()
        assert tick is not None
        assert tick.first_stage == tick.last_stage or tick.last_stage == plan.last
        for row in tick.rows:
            waited = now - waiting_since.get(row.sequence, now)
            assert waited <= 0.02 + plan.stages * rows * 2e-3, "a row starves"
        now += 1e-3
        for row in tick.rows:
            waiting_since[row.sequence] = now
            _advance(scheduler, plan, row, tick.last_stage, dice.random() < leaves)


def _advance(scheduler: Scheduler, plan: StagePlan, row: Row, stage: int, leaves: bool) -> None:
    sequence = row.sequence
    positions = sequence.pending.pop(row.stage, []) + row.positions
    if stage == plan.last or (leaves and row.may_leave):
        sequence.tokens.append(1)
        sequence.left_at.append(stage)
        sequence.computed = row.stop
        scheduler.finish_pass(sequence)
    else:
        sequence.put_back(stage + 1, positions)
        scheduler.move_on(row, stage + 1)


def test_a_long_prompt_is_computed_beside_decode_steps_in_chunks_that_cost_what_they_do() -> None:
    plan, costs, pool = StagePlan(9, (4,)), StageCosts(), PagePool(4096)
    for stage in range(plan.stages):
        for _ in range(2):  # a first run is not counted
            costs.ran(FULL, stage, 4, 4e-3)
            costs.ticked(4, 2e-3)
    scheduler = Scheduler(plan, pool, max_num_seqs=8, max_num_batched_tokens=512, costs=costs)
    for i in range(4):
        scheduler.add(Sequence(f"{i}", FULL, ExitPolicy(), [1], 1, PageTable(pool, 16)))
    scheduler.add(Sequence("long", FULL, ExitPolicy(), [1] * 3000, 3000, PageTable(pool, 16)))
    first = scheduler.next_tick()
    assert first is not None
    assert first.tokens == 512  # nobody decodes yet
    for row in first.rows:
        if row.sequence.name != "long":
            row.sequence.tokens.append(1)
            row.sequence.left_at.append(plan.last)
        row.sequence.computed = row.stop
        scheduler.finish_pass(row.sequence)
    for each, chunk in ((1e-5, 300), (1e-4, 30), (1e-2, LEAST_CHUNK)):
        for stage in range(plan.stages):
            costs.stages[FULL, stage].each = each
        tick = scheduler.next_tick()
        assert tick is not None
        assert sorted(len(row.positions) for row in tick.rows) == [1, 1, 1, 1, chunk]
        for row in tick.rows:
            row.sequence.computed = row.stop if row.sequence.name == "long" else row.sequence.computed
            scheduler.finish_pass(row.sequence)


def test_where_more_prompts_wait_than_sequences_decode_they_get_more_of_a_step() -> None:
    plan, costs, pool = StagePlan(9, (4,)), StageCosts(), PagePool(4096)
    for stage in range(plan.stages):
        for _ in range(2):  # a first run is not counted
            costs.ran(FULL, stage, 2, 4e-3)
            costs.ticked(2, 2e-3)
        costs.stages[FULL, stage].each = 1e-4
    scheduler = Scheduler(plan, pool, max_num_seqs=16, max_num_batched_tokens=512, costs=costs)
    for i in range(2):
        scheduler.add(Sequence(f"{i}", FULL, ExitPolicy(), [1], 1, PageTable(pool, 16)))
    first = scheduler.next_tick()
    assert first is not None
    for row in first.rows:
        row.sequence.tokens.append(1)
        row.sequence.left_at.append(plan.last)
        row.sequence.computed = row.stop
        scheduler.finish_pass(row.sequence)
    for i in range(8):
        scheduler.add(Sequence(f"prompt {i}", FULL, ExitPolicy(), [1] * 3000, 3000, PageTable(pool, 16)))
    tick = scheduler.next_tick()
    assert tick is not None
    # a step of 4 ms in each stage and 2 around takes 30 tokens at 0.1 ms a stage, for 6 ms; eight prompts beside two
    # steps get four times as many
    assert sorted(len(row.positions) for row in tick.rows) == [1, 1, 120]
