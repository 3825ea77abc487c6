"""The search with calls that take the time they are told to: what it takes, what it leaves, and when it stops."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from exeunt.kernels.linear_parts import MOST_SCRATCH, launch_for
from exeunt.kernels.linear_rule import OTHER_TILES, TILES, LinearTiles
from exeunt.kernels.linear_tiles import Tile
from exeunt.kernels.tuned.candidates import candidates
from exeunt.kernels.tuned.launches import MEASURED_ROWS, Key, TunedLaunch, forced
from exeunt.kernels.tuned.search import ORDER, Search, search
from exeunt.kernels.tuned.shape import LinearShape
from tests.kernels.tuned.measured import FULL, INT4

SMALL = LinearShape(256, 64, int4=True)
"""One part, so that there is nothing to split."""


@dataclass
class Bench:
    """A GPU on which every call by the rule takes 100 ms, and the launches of `times` what these say."""

    times: dict[TunedLaunch, float] = field(default_factory=dict)
    later: dict[TunedLaunch, float] = field(default_factory=dict)  # when they are timed again
    unequal: tuple[TunedLaunch, ...] = ()
    otherwise: tuple[TunedLaunch, ...] = ()  # summed in another order, which the result does not show
    untold: tuple[TunedLaunch, ...] = ()  # of which the low bits cannot be asked
    broken: tuple[TunedLaunch | None, ...] = ()
    now: float = 0.0
    tried: list[tuple[LinearShape, int]] = field(default_factory=list)
    prepared: list[int] = field(default_factory=list)
    most_warps: int = 8
    known: tuple[Key, ...] = ()
    used: dict[Key, TunedLaunch | None] = field(default_factory=dict)

    def __call__(self, shape: LinearShape, rows: int) -> "Call":
        """A call of a shape."""
        self.tried.append((shape, rows))
        return Call(self)

    def search(self, shapes: Sequence[LinearShape], seconds: float) -> Search:
        """What is found of them in so many seconds of this bench's."""
        return search(
            shapes,
            seconds,
            self,
            most_warps=self.most_warps,
            known=self.known,
            used=self.used,
            clock=lambda: self.now,
        )


@dataclass
class Call:
    """One call on the bench."""

    bench: Bench
    timed: list[TunedLaunch | None] = field(default_factory=list)

    def prepare(self, launches: Sequence[TunedLaunch], left: Callable[[], float]) -> None:
        """Note how many there are."""
        self.bench.prepared.append(len(launches))

    def result(self, launch: TunedLaunch | None) -> Tensor:
        """The same for all launches, but for those that are to differ by the sign of a zero."""
        if launch in self.bench.broken:
            raise RuntimeError("out of resource: shared memory")
        return torch.tensor([[-0.0 if launch in self.bench.unequal else 0.0, 1.0]], dtype=torch.bfloat16)

    def low_bits(self, launch: TunedLaunch | None) -> Tensor:
        """Nothing is left but of launches that sum otherwise."""
        if launch in self.bench.untold:
            raise RuntimeError("out of resource: registers")
        return torch.tensor([0.0, 1e-9 if launch in self.bench.otherwise else 0.0], dtype=torch.bfloat16)

    def seconds(self, launch: TunedLaunch | None) -> float:
        """What this bench says, and so much later it is then."""
        again = launch in self.timed
        self.timed.append(launch)
        taken = self.bench.times.get(launch, 0.2) if launch is not None else 0.1
        if again and launch is not None:
            taken = self.bench.later.get(launch, taken)
        self.bench.now += taken
        return taken


def _fastest(found: Search, shape: LinearShape = SMALL, rows: int = 1) -> TunedLaunch | None:
    return found.launches[shape.key(rows)]


FIRST, SECOND, THIRD = candidates(SMALL, 1, 8)[:3]


def test_the_fastest_launch_is_found_and_its_gain_told() -> None:
    found = Bench({FIRST: 0.08, SECOND: 0.05}).search([SMALL], 1e9)
    assert _fastest(found) == SECOND
    (best,) = (finding for finding in found.findings if finding.key == SMALL.key(1))
    assert (best.seconds, best.rule_seconds) == (0.05, 0.1)
    assert best.speed_up == pytest.approx(2)
    assert best in found.faster
    assert found.calls == len(found.findings) == len(ORDER)
    assert found.seconds > 0


@pytest.mark.parametrize(("taken", "wins"), [(0.0975, False), (0.09, True)])
def test_less_than_three_percent_is_noise(taken: float, wins: bool) -> None:
    found = Bench({FIRST: taken}).search([SMALL], 1e9)
    assert _fastest(found) == (FIRST if wins else None)


def test_a_gain_that_does_not_come_again_is_none() -> None:
    assert _fastest(Bench({FIRST: 0.05}, {FIRST: 0.1}).search([SMALL], 1e9)) is None


def test_other_bits_are_never_taken() -> None:
    found = Bench({FIRST: 0.01, SECOND: 0.05}, unequal=(FIRST,)).search([SMALL], 1e9)
    assert _fastest(found) == SECOND
    assert len(found.unequal) == 2  # with 8 rows too
    assert found.unequal[0].startswith(f"int4 64 x 256, 1 rows, {FIRST.tile}")


def test_sums_in_another_order_are_never_taken_though_the_result_is_the_same() -> None:
    bench = Bench({FIRST: 0.01, SECOND: 0.02, THIRD: 0.05}, otherwise=(FIRST,), untold=(SECOND,))
    found = bench.search([SMALL], 1e9)
    assert _fastest(found) == THIRD
    assert len(found.unequal) == len(found.failed) == 2  # with 8 rows too
    assert found.unequal[0].startswith(f"int4 64 x 256, 1 rows, {FIRST.tile}")
    assert found.failed[0].endswith("RuntimeError: out of resource: registers")
    assert _fastest(Bench({FIRST: 0.01}, otherwise=(FIRST,)).search([SMALL], 1e9)) is None


def test_what_is_known_is_not_tried() -> None:
    first = Bench()
    found = first.search([SMALL, FULL], 1.5)
    assert 0 < len(found.findings) < found.calls == 2 * len(ORDER)
    second = Bench(known=tuple(found.launches))
    rest = second.search([SMALL, FULL], 1e9)
    assert rest.calls == len(rest.findings) == found.calls - len(found.findings)
    assert not found.launches.keys() & rest.launches.keys()


def test_what_does_not_run_is_passed_over() -> None:
    found = Bench({FIRST: 0.01, SECOND: 0.05}, broken=(FIRST,)).search([SMALL], 1e9)
    assert _fastest(found) == SECOND
    assert found.failed[0].endswith("RuntimeError: out of resource: shared memory")


def test_a_call_that_does_not_run_by_the_rule_is_passed_over() -> None:
    found = Bench(broken=(None,)).search([SMALL], 1e9)
    assert found.findings == []
    assert len(found.failed) == len(ORDER)
    assert "the rule" in found.failed[0]


def test_a_call_that_has_no_room_is_passed_over() -> None:
    bench = Bench()

    def trial(shape: LinearShape, rows: int) -> Call:
        if shape == INT4:
            raise torch.OutOfMemoryError
        return bench(shape, rows)

    found = search([INT4, SMALL], 1e9, trial, most_warps=8, clock=lambda: bench.now)
    assert {finding.key for finding in found.findings} == {SMALL.key(rows) for rows in ORDER}


def test_decode_steps_and_large_weights_come_first() -> None:
    bench = Bench()
    bench.search([SMALL, INT4, FULL, INT4], 1e9)
    assert bench.tried == [(shape, rows) for rows in ORDER for shape in (INT4, FULL, SMALL)]
    assert set(ORDER) == set(MEASURED_ROWS)
    assert bench.prepared == [len(candidates(shape, rows, 8)) for shape, rows in bench.tried]


def test_it_ends_with_its_time() -> None:
    bench = Bench({FIRST: 0.05})
    found = bench.search([SMALL], 0.12)  # 0.1 by the rule, and the first launch is the last
    assert bench.tried == [(SMALL, 1)]
    assert _fastest(found) == FIRST  # it is timed once more, beside the rule
    assert found.seconds == pytest.approx(0.3)
    assert found.calls == len(ORDER)


def test_a_call_whose_launches_were_not_all_tried_is_not_the_rules() -> None:
    assert Bench().search([SMALL], 0.12).findings == []
    assert Bench().search([SMALL], 0).calls == len(ORDER)


def test_what_is_used_until_now_is_tried_before_the_time_ends() -> None:
    times = {FIRST: 0.09, SECOND: 0.05}
    assert _fastest(Bench(times).search([SMALL], 0.15)) == FIRST
    assert _fastest(Bench(times, used={SMALL.key(1): SECOND}).search([SMALL], 0.12)) == SECOND
    assert (
        _fastest(Bench({FIRST: 0.04, SECOND: 0.05}, used={SMALL.key(1): SECOND}).search([SMALL], 9)) == FIRST
    )
    other = TunedLaunch(Tile(256, 64, 5), split=False)  # of no candidate
    assert _fastest(Bench({other: 0.02, **times}, used={SMALL.key(1): other}).search([SMALL], 9)) == other


@pytest.mark.parametrize("most_warps", [2, 8])
@pytest.mark.parametrize("rows", MEASURED_ROWS)
@pytest.mark.parametrize("shape", [INT4, FULL, SMALL, LinearShape(14336, 4096, int4=False)])
def test_candidates_run_as_they_say_and_the_rule_is_none_of_them(
    shape: LinearShape, rows: int, most_warps: int
) -> None:
    found = candidates(shape, rows, most_warps)
    assert len(found) == len(set(found)) >= 2
    outputs = shape.out_features // 2 if shape.gated else shape.out_features
    for launch in (None, *found):
        with forced(launch):
            made = launch_for(rows, shape.in_features, outputs, shape.gated, shape.dtype, int4=shape.int4)
        assert (TunedLaunch(made.tile, made.split) in found) == (launch is not None)
        if launch is not None:
            assert (made.tile, made.split) == (launch.tile, launch.split)
            assert launch.tile.warps in ((1, 2, 4, 8) if shape.int4 else (2, 4, 8))
            assert launch.tile.warps <= most_warps


def test_parts_stay_together_where_there_is_one_or_too_many_tiles() -> None:
    assert not any(launch.split for launch in candidates(SMALL, 1, 8))
    assert any(launch.split for launch in candidates(INT4, 1, 8))
    assert not any(launch.split for launch in candidates(INT4, 512, 8))
    with forced(TunedLaunch(Tile(8, 64, 4), split=True)):  # measured with few rows, asked for with many
        launch = launch_for(512, 4096, 28672, False, torch.bfloat16, int4=False)
    assert (launch.grid, launch.split, launch.parts) == ((64, 448, 1), False, 8)


@pytest.mark.parametrize(("rows", "split"), [(512, True), (2048, True), (2049, False), (8192, False)])
def test_parts_stay_together_where_their_sums_would_take_too_much_memory(rows: int, split: bool) -> None:
    with forced(TunedLaunch(Tile(128, 128, 3, 8), split=True)):
        launch = launch_for(rows, 2048, 2048, False, torch.bfloat16, int4=False)
    assert launch.split is split
    assert (4 * launch.parts * rows * 2048 <= MOST_SCRATCH) is split


def test_tiles_of_more_than_two_warps_are_the_rules_on_hopper_alone() -> None:
    assert (TILES.most_warps, OTHER_TILES.most_warps) == (8, 2)


@pytest.mark.parametrize("rule", [TILES, OTHER_TILES])
def test_a_rules_large_tiles_are_no_others(rule: LinearTiles) -> None:
    assert rule.int4_tall not in (*rule.int4, rule.int4_wide)
    assert rule.full_wide not in rule.full


@pytest.mark.parametrize(
    ("rule", "rows", "outputs", "apart"),
    [
        (TILES, 24, 4096, True),
        (OTHER_TILES, 24, 4096, True),
        (OTHER_TILES, 512, 28672, False),
        (TILES, 64, 28672, False),
        (TILES, 64, 4096, True),
        (TILES, 512, 28672, False),
        (TILES, 1, 28672, True),
        (OTHER_TILES, 1, 4096, True),
    ],
)
def test_parts_of_int4_sums_are_apart_where_tiles_are_few(
    rule: LinearTiles, rows: int, outputs: int, apart: bool
) -> None:
    tile = rule.tile_for(rows, 4096, outputs, torch.bfloat16, int4=True)
    tiles = -(-rows // tile.rows) * -(-outputs // tile.outputs)
    assert rule.splits(rows, tiles, tile, int4=True) is apart
