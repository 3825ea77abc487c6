"""The scheduler alone: random requests, exits, cancellations and page shortages, run by a runner made of dice."""

import math
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exeunt.compression.variant import Variant
from exeunt.server.pages import PagePool, PageTable
from exeunt.server.request import ExitPolicy
from exeunt.server.row import Row
from exeunt.server.scheduler import MAX_OVERTAKEN, Scheduler
from exeunt.server.sequence import Sequence, Status
from exeunt.server.stage_costs import StageCosts
from exeunt.server.stages import StagePlan
from exeunt.server.tick import Tick
from tests.server.fixed_drafter import RestingDrafter

FULL, SMALL = Variant(), Variant("int4", "int4")
PAGE_TOKENS = {FULL: 4, SMALL: 12}
OFF, LEAVE = ExitPolicy(), ExitPolicy("approximate", threshold=0.5)


@dataclass
class Stage:
    """A little engine: applies made-up outcomes to the scheduler's ticks and checks what every tick must hold."""

    pages: int = 40
    max_num_seqs: int = 6
    budget: int = 16
    plan: StagePlan = field(default_factory=lambda: StagePlan(8, (1, 4)))
    seed: int = 0
    run_through: bool = False
    costs: StageCosts | None = None
    ahead: bool = False  # begin ticks before their turn, where the scheduler knows them
    now: float = 0.0

    def __post_init__(self) -> None:
        self.pool = PagePool(self.pages)
        self.scheduler = Scheduler(
            self.plan,
            self.pool,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.budget,
            policy="run-through" if self.run_through else "queues",
            costs=self.costs,
            clock=lambda: self.now,
        )
        self.dice = random.Random(self.seed)
        self.wanted: dict[Sequence, int] = {}
        self.blocks_run: dict[Sequence, list[tuple[int, int]]] = {}
        self.finished: list[Sequence] = []
        self.started: list[Sequence] = []  # in the order in which they started for the first time
        self.begun: Tick | None = None

    def add(self, prompt: int, new: int, variant: Variant = FULL, exits: ExitPolicy = OFF) -> Sequence:
        table = PageTable(self.pool, PAGE_TOKENS[variant])
        sequence = Sequence(f"s{len(self.wanted)}", variant, exits, [1] * prompt, prompt, table)
        sequence.limit, sequence.foreseeable = prompt + new, exits is OFF
        self.wanted[sequence] = new
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> Tick | None:
        self.now += 0.004
        tick = self.turn()
        self.started += [s for s in self.scheduler.take_admitted() if s not in self.started]
        self.scheduler.take_preempted()
        if tick is None:
            return None
        self.check(tick)
        self.begun = self.scheduler.tick_ahead(tick) if self.ahead else None
        for row in tick.rows:
            self.apply(tick, row)
        self.scheduler.served(tick.variant, 0.001 * len(tick.rows))
        return tick

    def turn(self) -> Tick | None:
        """The tick that was begun, without the sequences that have ended since; else what the scheduler says."""
        begun, self.begun = self.begun, None
        rows = () if begun is None else tuple(r for r in begun.rows if r.sequence.status is Status.RUNNING)
        if begun is None or not rows:
            return self.scheduler.next_tick()
        self.scheduler.resume(begun)
        return Tick(begun.variant, begun.first_stage, begun.last_stage, rows)

    def check(self, tick: Tick) -> None:
        sequences = [row.sequence for row in tick.rows]
        assert len(set(sequences)) == len(sequences)
        assert {s.variant for s in sequences} == {tick.variant}
        assert all(s.status is Status.RUNNING for s in sequences)
        assert tick.tokens <= max(self.budget, self.max_num_seqs + 1)
        for row in tick.rows:
            positions = row.positions or row.sequence.pending[row.stage]
            assert positions == sorted(set(positions))
            assert positions[-1] < row.sequence.table.capacity
            assert positions[0] >= row.sequence.computed
        held = [s.table for s in self.scheduler.running_sequences()]
        self.pool.check_integrity(held)

    def apply(self, tick: Tick, row: Row) -> None:
        sequence, last = row.sequence, tick.last_stage == self.plan.last
        positions = sequence.pending.pop(row.stage, []) + row.positions
        leaves = not last and row.may_leave and len(positions) == 1 and self.dice.random() < 0.5
        recorded = {p for p in positions if sequence.recorded_stage(p) == tick.last_stage}
        if sequence.yields_token(positions) and (last or leaves):
            sequence.tokens.append(1)
            sequence.left_at.append(tick.last_stage)
            if sequence.generated == self.wanted[sequence]:
                self.scheduler.remove(sequence)
                self.finished.append(sequence)
                return
        stay = [] if last or leaves else [p for p in positions if p not in recorded]
        if stay:
            sequence.put_back(tick.last_stage + 1, stay)
            self.scheduler.move_on(row, tick.last_stage + 1)
        else:
            sequence.computed = row.stop
            self.scheduler.finish_pass(sequence)


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 40), st.integers(1, 20), st.sampled_from([FULL, SMALL]), st.sampled_from([OFF, LEAVE])
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(
    REQUESTS,
    st.integers(16, 60),
    st.integers(1, 6),
    st.integers(1, 24),
    st.integers(0, 2**16),
    st.booleans(),
    st.booleans(),
)
def test_everything_finishes_and_nothing_leaks(
    requests: list[tuple[int, int, Variant, ExitPolicy]],
    pages: int,
    max_num_seqs: int,
    budget: int,
    seed: int,
    run_through: bool,
    ahead: bool,
) -> None:
    stage = Stage(pages, max_num_seqs, budget, seed=seed, run_through=run_through, ahead=ahead)
    sequences = [stage.add(*request) for request in requests]
    for _ in range(20_000):
        if stage.step() is None:
            break
        if stage.dice.random() < 0.005:
            alive = [s for s in sequences if s.status is not Status.FINISHED]
            if alive:
                stage.scheduler.remove(stage.dice.choice(alive))
    assert all(s.status is Status.FINISHED for s in sequences)
    assert stage.scheduler.waiting == stage.scheduler.running == 0
    assert stage.pool.used == 0
    assert stage.scheduler.rows_waiting() == [0, 0, 0]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(1, 40), st.sampled_from([FULL, SMALL])), max_size=60),
    st.integers(35, 60),
    st.integers(1, 8),
    st.integers(0, 2**16),
)
def test_overtaking_is_bounded(
    requests: list[tuple[int, int, Variant]], pages: int, max_num_seqs: int, seed: int
) -> None:
    """However requests come, each is passed by at most so many later ones before it starts; and it starts."""
    stage = Stage(pages=pages, max_num_seqs=max_num_seqs, budget=16, seed=seed, run_through=True)
    added: list[Sequence] = []
    left = list(requests)
    for _ in range(20_000):
        while left and stage.dice.random() < 0.5:
            added.append(stage.add(*left.pop(0)))
        if stage.step() is None and not left:
            break
    assert [s for s in added if s.status is not Status.FINISHED] == []
    turn = {sequence: at for at, sequence in enumerate(stage.started)}
    for at, sequence in enumerate(added):
        passed_by = sum(turn[later] < turn[sequence] for later in added[at + 1 :])
        assert passed_by == sequence.overtaken <= MAX_OVERTAKEN


def test_who_lacks_pages_does_not_hold_up_who_does_not() -> None:
    stage = Stage(pages=20, max_num_seqs=6, budget=16)
    stage.add(40, 20)
    stage.step()
    large = stage.add(48, 20, FULL)
    small = [stage.add(10, 4, SMALL), stage.add(4, 4, FULL)]
    stage.step()
    assert [s.status for s in (large, *small)] == [Status.WAITING, Status.RUNNING, Status.RUNNING]


def test_who_has_waited_enough_is_passed_no_more() -> None:
    stage = Stage(pages=20, max_num_seqs=6, budget=16)
    stage.add(40, 8)
    stage.step()
    large = stage.add(60, 2)
    for _ in range(60):  # an endless supply of small ones
        stage.add(4, 2)
    while large.status is Status.WAITING:
        assert stage.step() is not None
    assert large.overtaken == MAX_OVERTAKEN
    assert stage.started.index(large) == 1 + MAX_OVERTAKEN


def test_nobody_passes_a_preempted_sequence() -> None:
    stage = Stage(pages=12, max_num_seqs=4, budget=16)
    stage.add(20, 24)
    young = stage.add(16, 24)
    while young.preemptions == 0:
        assert stage.step() is not None
    late = stage.add(2, 2)
    while young.status is Status.WAITING:
        assert late.status is Status.WAITING
        assert stage.step() is not None


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=8), st.integers(18, 40)
)
def test_the_oldest_that_runs_is_never_preempted(requests: list[tuple[int, int]], pages: int) -> None:
    stage = Stage(pages=pages, max_num_seqs=8, budget=16, run_through=True)
    for prompt, new in requests:
        stage.add(prompt, new)
    while True:
        oldest = min(stage.scheduler.running_sequences(), key=lambda s: s.order, default=None)
        before = oldest.preemptions if oldest else 0
        if stage.step() is None:
            break
        assert oldest is None or oldest.preemptions == before


def test_several_that_start_together_find_pages_for_all_of_them() -> None:
    """A page promised to one prompt is not promised to the next."""
    stage = Stage(pages=24, max_num_seqs=6, budget=64)
    for _ in range(6):
        stage.add(40, 1)
    while stage.step() is not None:
        pass
    assert [s.preemptions for s in stage.started] == [0] * 6


def test_shortage_preempts_the_youngest_and_replays_recorded_exits() -> None:
    stage = Stage(pages=8, max_num_seqs=4, budget=16, seed=3)
    old = stage.add(8, 16, exits=LEAVE)
    young = stage.add(8, 16, exits=LEAVE)
    while stage.step() is not None:
        pass
    assert old.preemptions == 0
    assert young.preemptions > 0
    assert young.generated == old.generated == 16
    assert len(young.left_at) == 16


def test_variants_take_turns_by_time_served() -> None:
    stage = Stage(pages=200, max_num_seqs=12, budget=16)
    for _ in range(10):
        stage.add(2, 90, FULL)
    stage.add(2, 90, SMALL)
    seconds = {FULL: 0.0, SMALL: 0.0}
    for _ in range(60):
        tick = stage.step()
        assert tick is not None
        seconds[tick.variant] += 0.001 * len(tick.rows)  # as `Stage.step` tells the scheduler
        assert stage.scheduler.running == 11
    # a tick of FULL costs ten of SMALL: equal time, not equal turns
    assert 0.5 < seconds[SMALL] / seconds[FULL] < 2.0


def test_long_prompt_is_cut_and_decoding_rows_ride_along() -> None:
    stage = Stage(pages=60, max_num_seqs=4, budget=8)
    decoding = stage.add(2, 30)
    while decoding.generated < 2:
        stage.step()
    stage.add(40, 2)
    sizes = []
    while (tick := stage.step()) is not None and decoding.generated < 8:
        assert decoding in [row.sequence for row in tick.rows]
        sizes.append(tick.tokens)
    assert max(sizes) == 8


def test_running_through_lets_no_row_wait_between_stages() -> None:
    stage = Stage(run_through=True)
    stage.add(6, 8, exits=LEAVE)
    while (tick := stage.step()) is not None:
        assert (tick.first_stage, tick.last_stage) == (0, stage.plan.last)


def test_rows_that_cannot_leave_run_through_in_one_tick() -> None:
    stage = Stage()
    stage.add(6, 3, exits=OFF)
    tick = stage.step()
    assert tick is not None
    assert (tick.first_stage, tick.last_stage) == (0, stage.plan.last)


def test_a_prompt_is_never_stopped_at_an_exit_but_its_decode_steps_are() -> None:
    stage = Stage()
    stage.add(6, 3, exits=LEAVE)
    prefill, decode = stage.step(), stage.step()
    assert prefill is not None
    assert decode is not None
    assert (prefill.first_stage, prefill.last_stage) == (0, stage.plan.last)
    assert (decode.first_stage, decode.last_stage) == (0, 0)


def test_a_sequence_admitted_first_is_never_preempted_by_a_later_one() -> None:
    stage = Stage(pages=12, max_num_seqs=6, budget=16, seed=5)
    first = stage.add(10, 30)
    for _ in range(5):
        stage.add(6, 20)
    while stage.step() is not None:
        pass
    assert first.preemptions == 0


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


def test_who_waits_longest_is_judged_by_the_stage_that_it_waits_at() -> None:
    stage = Stage(max_num_seqs=2)
    stage.dice.random = lambda: 1.0  # type: ignore[method-assign]  # nobody leaves
    row, came = Row(stage.add(1, 9, exits=LEAVE), [], 0), 0.0
    while row.stage != 1 and (tick := stage.step()) is not None:
        row, came = tick.rows[0], stage.now
    assert (row.stage, row.since) == (1, came)
    stage.step()
    assert (row.stage, row.since) == (2, stage.now)
    assert row.since > came
