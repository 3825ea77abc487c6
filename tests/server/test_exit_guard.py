"""The exit guard's steps: when it acts, how far, and that nobody ever gets a looser threshold than calibrated."""

import logging
import math
import random
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exeunt.server.exit_guard import FIRST_REST, LAST_STEP, MOST_REST, STEP, WINDOW, ExitGuard, threshold_at
from exeunt.server.metrics import Metrics, new_registry
from exeunt.server.request import ExitPolicy

POLICY = ExitPolicy("approximate", threshold=0.8, target=0.02, skipped_kv="backfill")


class Exported:
    """What the guard has said of thresholds."""

    def __init__(self) -> None:
        self.heard: list[dict[float, float | None]] = []

    def __call__(self, thresholds: Mapping[float, float | None]) -> None:
        self.heard.append(dict(thresholds))


def guard(exported: Exported | None = None) -> ExitGuard:
    return ExitGuard({0.02: 0.8, 0.05: None}, exported or Exported())


def feed(guard: ExitGuard, policy: ExitPolicy, rate: float, most: int, seed: int = 0) -> int:
    """Audits of a text with this disagreement until the step changes or `most` are spent; how many it took."""
    dice, applied = random.Random(seed), guard.applied(policy)
    for count in range(1, most + 1):
        guard.observe(applied, dice.random() >= rate)
        if guard.applied(policy).guard_step != applied.guard_step:
            return count
    return most


@given(st.floats(0, 1), st.integers(0, LAST_STEP))
def test_a_threshold_is_never_looser_than_calibrated_and_rises_with_the_steps(
    calibrated: float, step: int
) -> None:
    thresholds = [threshold_at(calibrated, each) for each in range(step + 1)]
    assert thresholds[0] == calibrated
    known = [each for each in thresholds if each is not None]
    assert all(calibrated <= each <= 1.0 for each in known)
    assert known == sorted(known)
    assert (thresholds[-1] is None) == (step == LAST_STEP)


def test_a_step_is_half_a_unit_of_log_odds() -> None:
    for step in range(1, LAST_STEP):
        raised = threshold_at(0.8, step)
        assert raised is not None
        assert math.log(raised / (1 - raised)) == pytest.approx(math.log(4) + STEP * step)


def test_too_much_disagreement_raises_the_threshold_of_later_requests(
    caplog: pytest.LogCaptureFixture,
) -> None:
    exported = Exported()
    watched = guard(exported)
    assert watched.applied(POLICY) == POLICY
    with caplog.at_level(logging.INFO, "exeunt.guard"):
        assert feed(watched, POLICY, rate=0.2, most=500) < 200
    applied = watched.applied(POLICY)
    assert applied.threshold == threshold_at(0.8, 1)
    assert (applied.guard_step, applied.target, applied.skipped_kv) == (1, 0.02, "backfill")
    assert exported.heard == [{0.02: threshold_at(0.8, 1)}]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "max_disagreement 0.02: exit guard at step 1 of 10, was 0" in record.getMessage()


def test_what_was_admitted_before_a_change_is_no_evidence_after_it() -> None:
    watched = guard()
    feed(watched, POLICY, rate=0.5, most=200)
    for _ in range(1000):
        watched.observe(POLICY, agreed=False)  # still at the calibrated threshold
    assert watched.applied(POLICY).guard_step == 1


def test_each_combination_starts_from_its_own_threshold() -> None:
    watched = guard()
    feed(watched, POLICY, rate=0.5, most=200)
    other = ExitPolicy("approximate", threshold=0.95, target=0.02, skipped_kv="propagate")
    assert watched.applied(other).threshold == threshold_at(0.95, 1)
    assert watched.applied(ExitPolicy("approximate", threshold=0.8, target=0.1)).guard_step == 0


@pytest.mark.parametrize(
    "exits", [ExitPolicy(), ExitPolicy("verified"), ExitPolicy("approximate", threshold=0.8)]
)
def test_bare_thresholds_and_other_modes_are_not_guarded(exits: ExitPolicy) -> None:
    exported = Exported()
    watched = guard(exported)
    feed(watched, POLICY, rate=0.5, most=200)
    for _ in range(500):
        watched.observe(exits, agreed=False)
    assert watched.applied(exits) is exits
    assert len(exported.heard) == 1


def test_a_target_that_the_default_combination_lacks_is_guarded_and_not_exported() -> None:
    exported = Exported()
    watched = guard(exported)
    policy = ExitPolicy("approximate", threshold=0.7, target=0.05)
    feed(watched, policy, rate=0.9, most=200)
    assert watched.applied(policy).guard_step == 1
    assert exported.heard == []


def test_it_relaxes_when_little_disagrees_and_never_beyond_the_calibrated_threshold() -> None:
    exported = Exported()
    watched = guard(exported)
    feed(watched, POLICY, rate=0.5, most=200)
    feed(watched, POLICY, rate=0.5, most=200)
    assert watched.applied(POLICY).guard_step == 2
    assert feed(watched, POLICY, rate=0.001, most=5000) < 2000
    assert feed(watched, POLICY, rate=0.001, most=5000) < 2000
    assert watched.applied(POLICY) == POLICY
    assert feed(watched, POLICY, rate=0.0, most=WINDOW + 1) == WINDOW + 1
    assert watched.applied(POLICY) == POLICY
    assert [heard[0.02] for heard in exported.heard] == [threshold_at(0.8, step) for step in (1, 2, 1, 0)]


def test_what_was_long_ago_does_not_outweigh_today() -> None:
    """Ten times the target is seen within a tenth of the window at the latest, however long all was well before."""
    watched = guard()
    feed(watched, POLICY, rate=0.0, most=2 * WINDOW)
    assert feed(watched, POLICY, rate=0.2, most=500) < 200
    watched = guard()
    feed(watched, POLICY, rate=0.0, most=WINDOW // 2)
    assert feed(watched, POLICY, rate=0.2, most=2000) < WINDOW // 10


def closed(exported: Exported | None = None) -> ExitGuard:
    """A guard that lets no token leave."""
    watched = guard(exported)
    for _ in range(LAST_STEP):
        feed(watched, POLICY, rate=1.0, most=50)
    return watched


def rest(watched: ExitGuard) -> int:
    """Requests without an audit until the step changes."""
    step, asked = watched.applied(POLICY).guard_step, 1
    while watched.applied(POLICY).guard_step == step:
        asked += 1
    return asked


def test_where_no_token_leaves_it_tries_again_after_a_rest_that_grows() -> None:
    exported = Exported()
    watched = closed(exported)
    assert watched.applied(POLICY).threshold is None
    assert exported.heard[-1] == {0.02: math.inf}
    rests = []
    for _ in range(8):
        rests.append(rest(watched))
        feed(watched, POLICY, rate=1.0, most=50)
    expected = [min(FIRST_REST * 2**n, MOST_REST) for n in range(8)]
    assert all(0 <= most - found <= 2 for most, found in zip(expected, rests, strict=True))
    assert rests[-1] < MOST_REST < FIRST_REST * 2**7


def test_a_silent_step_is_left_like_the_last_and_without_failing_the_rest_does_not_grow() -> None:
    watched = closed()
    for step in range(LAST_STEP - 1, -1, -1):
        assert rest(watched) <= FIRST_REST
        assert watched.applied(POLICY).guard_step == step
    for _ in range(3 * FIRST_REST):
        assert watched.applied(POLICY) == POLICY


def test_where_audits_come_a_step_is_not_left_for_want_of_them() -> None:
    watched = guard()
    feed(watched, POLICY, rate=0.5, most=200)
    applied = watched.applied(POLICY)
    for number in range(5 * FIRST_REST):
        assert watched.applied(POLICY) == applied
        if number % (FIRST_REST // 2) == 0:
            watched.observe(applied, agreed=True)


def test_a_trial_that_goes_well_is_followed_by_the_way_back() -> None:
    watched = closed()
    rest(watched)
    for step in range(LAST_STEP - 1, 0, -1):
        assert watched.applied(POLICY).guard_step == step
        feed(watched, POLICY, rate=0.0, most=5000)
    assert watched.applied(POLICY) == POLICY


def test_the_gauge_follows() -> None:
    metrics = Metrics(new_registry(), "tiny", ["0"], [], [0.02, 0.05])
    watched = ExitGuard({0.02: 0.8, 0.05: None}, metrics.exit_thresholds)
    feed(watched, POLICY, rate=0.5, most=200)
    label = {"model_name": "tiny", "target": "0.02"}
    assert metrics.registry.get_sample_value("exeunt_exit_threshold", label) == threshold_at(0.8, 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.999))
def test_whatever_happens_nobody_gets_a_looser_threshold(
    seed: int, rates: list[float], calibrated: float
) -> None:
    exported = Exported()
    watched = ExitGuard({0.02: calibrated}, exported)
    policy = ExitPolicy("approximate", threshold=calibrated, target=0.02)
    dice = random.Random(seed)
    for rate in rates:
        for _ in range(100):
            applied = watched.applied(policy)
            assert applied.threshold is None or applied.threshold >= calibrated
            watched.observe(applied, dice.random() >= rate)
    for heard in exported.heard:
        assert heard[0.02] is not None
        assert heard[0.02] >= calibrated


def test_text_like_the_calibration_text_seldom_sees_it_act() -> None:
    """At the target itself: one run in twenty at most acts within a window, by the bound's confidence."""
    acted = 0
    for seed in range(40):
        watched = guard()
        feed(watched, POLICY, rate=0.02, most=600, seed=seed)
        acted += watched.applied(POLICY).guard_step
    assert acted <= 4
