"""Planted curves: what lies below the paper's is found to, and what touches it anywhere is not."""

from collections.abc import Sequence

import pytest

from exeunt.calibration.bootstrap import Measure
from exeunt.calibration.evaluation import EvaluationTable, Mode, ModeResult
from exeunt.calibration.trade_off import (
    Comparison,
    TradeCurve,
    TradePoint,
    compare,
    paper_curve,
    trade_curves,
)
from exeunt.compression.variant import SkippedKV, Variant

FULL, SMALL = Variant("full", "full", False), Variant("int4", "int4", False)


def curve(*points: tuple[float, float], width: float = 0.001, start: float = 0.0) -> TradeCurve:
    found = [
        TradePoint(0.5, Measure(saved, saved, saved), Measure(cost, cost - width, cost + width))
        for saved, cost in points
    ]
    return TradeCurve(SMALL, "propagate", "net", "variant", start, tuple(found))


def test_the_papers_points_are_relative_to_its_full_depth() -> None:
    assert paper_curve()[0] == (0.0, 0.0)
    assert [saved for saved, _ in paper_curve()[1:]] == [0.064, 0.133, 0.174, 0.269]
    assert [cost for _, cost in paper_curve()[1:]] == pytest.approx(
        [0.3807, 0.9417, 1.4170, 3.1581], abs=1e-4
    )


def test_half_the_papers_price_lies_below_it() -> None:
    ours = [(saved, cost / 2) for saved, cost in paper_curve()[1:]]
    found = compare(curve(*ours))
    assert (found.below, found.surely, found.compared, found.reached) == (True, True, 8, 4)
    assert found.closest == pytest.approx(0.5)


def test_a_wide_interval_is_below_but_not_surely() -> None:
    found = compare(curve((0.1, 0.5), width=0.3))
    assert (found.below, found.surely) == (True, False)


def test_one_point_above_is_enough() -> None:
    assert not compare(curve((0.05, 0.1), (0.064, 0.39), (0.2, 0.5))).below


def test_a_line_that_passes_above_between_our_points_is_seen_at_the_papers() -> None:
    """Both of ours lie below the paper's line, but the straight line between them does not."""
    ours = ((0.02, 0.11), (0.26, 2.9))
    found = compare(curve(*ours))
    assert found.reached == 3
    assert not found.below
    assert compare(curve(*ours[:1])).below


def test_saving_nothing_at_a_price_is_above_everything() -> None:
    found = compare(curve((-0.03, 0.01), (0.05, 0.01)))
    assert not found.below
    assert found.closest == pytest.approx(0.01 / (0.05 / 0.064 * 4.31 / 11.32))
    assert compare(curve((-0.03, 0.01))).closest is None


def test_what_goes_beyond_the_papers_last_point_is_not_compared_there() -> None:
    found = compare(curve((0.1, 0.2), (0.4, 9.0)))
    assert found.compared == 1 + 4
    assert not found.below  # the line to the far point is above the paper's at its last two
    assert compare(curve((0.4, 1.0))).compared == 4


def test_a_start_above_nothing_counts() -> None:
    """With INT4's own price in it, ours begins above the paper's, which lies below it only where both save."""
    points = ((0.064, 0.2), (0.133, 0.3))
    assert compare(curve(*points, start=0.1)).below
    assert not compare(curve((0.133, 0.3), start=0.7)).below


def test_nothing_to_compare_is_not_below() -> None:
    assert compare(curve()) == Comparison(False, False, 0, 0, None)


def result(mode: Mode, cost: float, layers: float, net: float) -> ModeResult:
    def exact(value: float) -> Measure:
        return Measure(value, value, value)

    return ModeResult(
        mode=mode,
        perplexity=exact(20 * (1.1 + cost)),
        perplexity_increase=exact(20 * (0.1 + cost)),
        perplexity_ratio=exact(1.1 + cost),
        exits_ratio=None if mode.threshold is None else exact(1.0 + cost / 1.1),
        kl=exact(0.1),
        agreement=exact(0.9),
        mean_depth=exact(8 * (1 - layers)),
        exit_rate=exact(layers),
        disagreement=None,
        passes_saved=exact(layers),
        compute_saved=exact(net),
        by_exit=(1,),
        tokens=100,
    )


def points(
    curves: Sequence[TradeCurve], method: SkippedKV, axis: str, base: str
) -> list[tuple[float, float]]:
    (found,) = (each for each in curves if (each.skipped_kv, each.axis, each.base) == (method, axis, base))
    return [(point.saved.value, point.increase.value) for point in found.points]


def test_curves_take_certified_and_swept_thresholds_of_one_variant() -> None:
    table = EvaluationTable(
        "t",
        100,
        1,
        8,
        (
            result(Mode(FULL), -0.1, 0, 0),
            result(Mode(SMALL), 0.0, 0, 0),
            result(Mode(SMALL, 0.9, 0.05), 0.022, 0.1, 0.05),
            result(Mode(FULL, 0.9, 0.05), 0.5, 0.5, 0.5),
        ),
        (
            result(Mode(SMALL, 0.4), 0.22, 0.3, 0.2),
            result(Mode(SMALL, 0.95), 0.011, 0.02, -0.01),
            result(Mode(SMALL, 0.4, None, "backfill"), 0.11, 0.3, -0.02),
        ),
    )
    curves = trade_curves(table, SMALL)
    assert {(each.skipped_kv, each.axis) for each in curves} == {
        ("propagate", "layers"),
        ("propagate", "net"),
        ("backfill", "layers"),
    }
    assert points(curves, "propagate", "layers", "variant") == [
        pytest.approx(pair) for pair in ((0.02, 0.01), (0.1, 0.02), (0.3, 0.2))
    ]
    assert points(curves, "propagate", "net", "reference") == [
        pytest.approx(pair) for pair in ((-0.01, 0.111), (0.05, 0.122), (0.2, 0.32))
    ]
    assert {each.start for each in curves if each.base == "variant"} == {0.0}
    assert all(each.start == pytest.approx(0.1) for each in curves if each.base == "reference")
