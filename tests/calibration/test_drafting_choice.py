"""Which exit drafts: planted cases where the answer is known, and the speed that is expected against a simulation."""

from dataclasses import replace

import numpy as np
import pytest

from exeunt.calibration.drafting_choice import (
    DEEP_TOKENS,
    MOST_DRAFTS,
    DraftRates,
    PassCosts,
    choose_drafting,
    draft_rates,
    draft_speed,
)
from exeunt.calibration.thresholds import GateView

BLOCKS, TOKENS = 12, 20_000


def costs(gate: float = 0.0, projection: float = 0.0, per_token: float = 0.0) -> PassCosts:
    """A block costs 1/12; deep passes cost `per_token` of that more for each token after the first."""
    depths = range(1, BLOCKS)
    shallow = {depth: depth / BLOCKS for depth in depths}
    deep = {
        depth: tuple((BLOCKS - depth) / BLOCKS * (1 + per_token * (n - 1)) for n in DEEP_TOKENS)
        for depth in depths
    }
    return PassCosts(gate, projection, shallow, deep)


def always(acceptance: float) -> DraftRates:
    return DraftRates(0.0, 1.0, 1.0, acceptance)


def view(*exits: tuple[float, float]) -> GateView:
    """Exits of (share that is sure and right, agreement among the others, of which the gate is not sure)."""
    g = np.random.default_rng(0)
    ease = g.random(TOKENS)
    sure = np.stack([ease < share for share, _ in exits])
    other = np.array([[rest] for _, rest in exits])
    reach = np.where(sure, 0.9, 0.3)
    agrees = sure | (g.random(sure.shape) < other)
    looked, whole = np.where(sure, 1.0, 0.4), np.where(sure, 0.95, 0.35)
    return GateView(reach, looked, whole, agrees, np.zeros(TOKENS, dtype=np.int64), 1)


@pytest.mark.parametrize(("depth", "acceptance", "length", "speed"), [(3, 0.45, 1, 1.16), (3, 0.6, 2, 1.31)])
def test_speed_is_the_papers_arithmetic_where_everything_is_drafted(
    depth: int, acceptance: float, length: int, speed: float
) -> None:
    tokens = (1 - acceptance ** (length + 1)) / (1 - acceptance)
    share = depth / BLOCKS
    wanted = tokens / ((length + 1) * share + 1 - share)
    found = draft_speed(always(acceptance), depth, length, costs())
    assert found == pytest.approx(wanted)
    assert found == pytest.approx(speed, abs=0.01)


def test_gates_projections_and_tokens_of_the_deep_pass_are_paid_for() -> None:
    rates, dear = DraftRates(0.0, 0.5, 1.0, 0.5), costs(0.1, 0.2, 0.25)
    seconds = (
        3 * 0.25 + 2 * (0.1 + 0.5 * 0.2) + 0.75 * (1 + 0.25 * 2)
    )  # two drafts: the third gate is not asked
    assert draft_speed(rates, 3, 2, dear) == pytest.approx(1.75 / seconds)


def test_between_the_timed_lengths_times_are_interpolated() -> None:
    assert DEEP_TOKENS[-1] == MOST_DRAFTS + 1
    assert costs(per_token=0.5).deep_pass(6, 4) == pytest.approx(0.5 * (1 + 0.5 * 3))


def test_speed_equals_a_simulation() -> None:
    rates, paid = DraftRates(0.5, 0.8, 0.7, 0.6), costs(0.05, 0.1, 0.2)
    g = np.random.default_rng(1)
    tokens = seconds = 0.0
    for _ in range(20_000):
        drafts = 0
        seconds += paid.shallow[3]
        while drafts < 4:  # the gate is asked, and the step goes on where it says no
            seconds += paid.gate + rates.looked * paid.projection
            if g.random() >= rates.drafted:
                break
            drafts += 1
            seconds += paid.shallow[3]
        seconds += paid.deep_pass(3, drafts + 1)
        right = 0
        while right < drafts and g.random() < rates.acceptance:
            right += 1
        tokens += right + 1
    assert draft_speed(rates, 3, 4, paid) == pytest.approx(tokens / seconds, rel=0.01)


def test_rates_count_what_is_drafted_projected_and_right() -> None:
    seen = view((0.5, 0.2))
    seen.reach[0, :1000] = -1.0  # they may not be drafted, whatever the threshold
    by_share = {round(rates.drafted, 1): rates for rates in draft_rates(seen, 0)}
    assert set(by_share) == {0.5, 1.0}
    assert by_share[0.5].acceptance == 1.0
    assert by_share[1.0].acceptance == pytest.approx(0.6, abs=0.02)
    assert by_share[1.0].looked == 1.0
    assert by_share[0.5].looked == pytest.approx(by_share[0.5].drafted)
    assert by_share[1.0].whole == 1.0
    seen.whole[0, -1000:] = 1.0  # some are projected onto all tokens in vain
    (again,) = (rates for rates in draft_rates(seen, 0) if round(rates.drafted, 1) == 0.5)
    unsure = (seen.reach[0, -1000:] < again.threshold).sum() / (TOKENS - 1000)
    assert again.whole == pytest.approx(again.drafted + unsure)


def test_the_shallow_exit_drafts_where_it_is_right_often_enough() -> None:
    seen = view((0.5, 0.2), (0.55, 0.3))
    choice = choose_drafting(seen, (2, 6), costs(0.01, 0.01))
    assert choice.place == 0
    assert choice.plan.rates.acceptance == 1.0, "the gate leaves out the others"
    assert choice.plan.speed > 1.1
    assert choice.plan.speed == max(plan.speed for plan in choice.plans)


def test_the_deeper_exit_drafts_where_the_shallow_one_is_wrong() -> None:
    assert choose_drafting(view((0.0, 0.1), (0.8, 0.3)), (2, 6), costs()).place == 1


def test_the_longest_draft_is_looked_at_where_drafts_are_right() -> None:
    assert choose_drafting(view((1.0, 1.0)), (2,), costs()).plan.length == MOST_DRAFTS


def test_where_nothing_pays_the_least_slow_is_kept_and_said_to_be_slow() -> None:
    choice = choose_drafting(view((0.1, 0.2), (0.2, 0.2)), (3, 8), costs(0.5, 0.5, 1.0))
    assert choice.plan.speed == max(plan.speed for plan in choice.plans) < 1.0


def test_with_a_shortlist_drafts_pay_for_their_logits_apart() -> None:
    dear = replace(costs(projection=0.2), looks=((64, 0.01),))
    listed = dear.with_shortlist(64)
    assert (listed.projection, listed.whole) == (0.01, dear.projection)
    assert dear.listed == listed
    assert costs().listed == costs()
    none, every = (DraftRates(0.5, 1.0, drafted, 0.9, drafted) for drafted in (0.0, 1.0))
    assert draft_speed(none, 3, 1, listed) > draft_speed(none, 3, 1, dear), "vain looks are cheaper"
    assert draft_speed(every, 3, 1, listed) < draft_speed(every, 3, 1, dear), "and who drafts pays both"
    asked = replace(none, whole=0.5)  # so does whom a shortlist lets pass in vain
    gates = 1.0 / draft_speed(asked, 3, 1, listed) - 1.0 / draft_speed(none, 3, 1, listed)
    assert gates == pytest.approx(0.5 * listed.whole)
