"""The tick behind one that runs: which it is, and when there is none."""

import math

import pytest

from exeunt.server.request import ExitPolicy
from exeunt.server.row import Row
from exeunt.server.stage_costs import StageCosts
from exeunt.server.tick import Tick
from tests.server.fixed_drafter import RestingDrafter
from tests.server.scheduler_stage import FULL, LEAVE, OFF, SMALL, Stage


def positions_of(tick: Tick | None) -> dict[str, list[int]] | None:
    return None if tick is None else {row.sequence.name: row.positions for row in tick.rows}


def test_the_tick_ahead_is_the_next_step_of_all_that_go_on() -> None:
    stage = Stage(max_num_seqs=3, run_through=True)
    for prompt, new in ((6, 9), (3, 2), (2, 1)):
        stage.add(prompt, new)
    first = stage.scheduler.next_tick()
    assert first is not None
    ahead = stage.scheduler.tick_ahead(first)
    assert positions_of(ahead) == {"s0": [6], "s1": [3]}  # the third ends with its only token
    assert ahead is not None
    assert all(row.stop <= row.sequence.table.capacity for row in ahead.rows)
    for row in first.rows:
        stage.apply(first, row)
    stage.scheduler.resume(ahead)
    assert stage.scheduler.next_tick() is None  # whoever goes on is under way
    assert positions_of(stage.scheduler.tick_ahead(ahead)) == {"s0": [7]}


def test_there_is_no_tick_ahead_of_tokens_that_must_be_known() -> None:
    for exits, foreseeable in ((LEAVE, False), (OFF, False), (ExitPolicy("verified"), False)):
        stage = Stage(run_through=True)
        stage.add(4, 9)
        stage.add(4, 9, exits=exits).foreseeable = foreseeable
        tick = stage.step()
        assert tick is not None
        assert stage.scheduler.tick_ahead(tick) is None


def test_a_tick_ahead_drafts_nothing_where_that_loses_less_than_it_gains() -> None:
    costs = StageCosts()
    for rows in (1, 2, 3) * 6:
        costs.stepped(FULL, rows, 0.020, ahead=True)
        costs.stepped(FULL, rows, 0.030, ahead=False)
    for seconds, begins in ((0.0, True), (0.004, True), (0.006, False), (math.inf, False)):
        stage, drafter = Stage(run_through=True, costs=costs), RestingDrafter(seconds)
        for _ in range(2):
            sequence = stage.add(4, 9, exits=ExitPolicy("verified"))
            sequence.drafter, sequence.foreseeable = drafter, True
        tick = stage.scheduler.next_tick()
        assert tick is not None
        assert not drafter.asked  # nothing is weighed where no step may be begun ahead
        ahead = stage.scheduler.tick_ahead(tick)
        assert drafter.asked == [4, 4]
        assert (ahead is not None) == begins
        assert ahead is None or all(row.deep and row.threshold is None for row in ahead.rows)


def test_a_step_is_plain_where_no_row_drafts() -> None:
    stage = Stage(run_through=True)
    leaving, drafting = stage.add(4, 9, exits=LEAVE), stage.add(4, 9, exits=ExitPolicy("verified"))
    drafting.drafter = RestingDrafter()
    for sequence in (leaving, drafting):
        sequence.foreseeable, sequence.computed = True, 4
        sequence.tokens.append(1)
        sequence.left_at.append(2)

    def plain(threshold: float | None = None, positions: tuple[int, ...] = (4,)) -> bool:
        rows = Row(leaving, [4], 5, threshold=0.5), Row(drafting, list(positions), 5, threshold=threshold)
        return Tick(FULL, 0, 2, rows).plain

    assert plain()
    assert not plain(threshold=0.5)  # the drafting exit is asked
    assert not plain(positions=(4, 5))
    for name, value in (("drafts", [1]), ("pending", {1: [4]}), ("foreseeable", False)):
        usual = getattr(drafting, name)
        setattr(drafting, name, value)
        assert not plain(), name
        setattr(drafting, name, usual)


@pytest.mark.parametrize("unsettled", ["a gate is asked", "drafts", "waiting tokens", "not foreseeable"])
def test_there_is_no_tick_ahead_of_drafts(unsettled: str) -> None:
    stage = Stage(run_through=True)
    sequence = stage.add(4, 9, exits=ExitPolicy("verified"))
    sequence.drafter, sequence.foreseeable = RestingDrafter(0.0), unsettled != "not foreseeable"
    tick = stage.scheduler.next_tick()
    assert tick is not None
    if unsettled == "a gate is asked":
        tick.rows[0].threshold = 0.5
    elif unsettled == "drafts":
        sequence.drafts.append(0)
    elif unsettled == "waiting tokens":
        sequence.pending[1] = [2]
    assert stage.scheduler.tick_ahead(tick) is None


def test_there_is_no_tick_ahead_of_who_has_a_turn_before() -> None:
    stage = Stage(max_num_seqs=3, budget=8, run_through=True)
    stage.add(2, 30)
    stage.step()
    decoding = stage.scheduler.next_tick()
    assert decoding is not None
    assert stage.scheduler.tick_ahead(decoding) is not None
    waiting = stage.add(2, 5)  # it may start now
    assert stage.scheduler.tick_ahead(decoding) is None
    stage.scheduler.remove(waiting)
    stage.add(2, 5, SMALL)  # another variant's turn
    stage.scheduler.admit()
    assert stage.scheduler.tick_ahead(decoding) is None


def test_there_is_no_tick_ahead_of_the_rest_of_a_prompt() -> None:
    stage = Stage(budget=8, run_through=True)
    stage.add(20, 5)
    tick = stage.scheduler.next_tick()
    assert tick is not None
    assert stage.scheduler.tick_ahead(tick) is None


def test_who_cannot_start_holds_up_no_tick_ahead() -> None:
    stage = Stage(pages=12, max_num_seqs=6, run_through=True)
    stage.add(8, 20)
    tick = stage.scheduler.next_tick()
    stage.add(40, 5)  # it waits for pages
    assert tick is not None
    assert stage.scheduler.tick_ahead(tick) is not None


def test_a_tick_ahead_finds_pages_for_all_of_its_rows_or_is_none() -> None:
    stage = Stage(pages=8, max_num_seqs=2, run_through=True)
    stage.add(8, 20)
    stage.add(4, 20)
    tick = stage.scheduler.next_tick()
    assert tick is not None
    assert len(tick.rows) == 2
    taken = stage.pool.allocate(stage.pool.free - 1)
    assert stage.scheduler.tick_ahead(tick) is None  # each needs one
    assert [len(row.sequence.table.pages) for row in tick.rows] == [2, 1]
    stage.pool.release(taken[:1])
    assert stage.scheduler.tick_ahead(tick) is not None
