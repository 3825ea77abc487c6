"""The scheduler alone: random requests, exits, cancellations and page shortages, run by a runner made of dice."""

from hypothesis import given, settings
from hypothesis import strategies as st

from exeunt.compression.variant import Variant
from exeunt.server.request import ExitPolicy
from exeunt.server.row import Row
from exeunt.server.scheduler import MAX_OVERTAKEN
from exeunt.server.sequence import Sequence, Status
from tests.server.scheduler_stage import FULL, LEAVE, OFF, SMALL, Stage

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
