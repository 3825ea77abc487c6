"""Which exits are kept: a planted case where the answer is known, and the arithmetic of what they save."""

from dataclasses import replace

import numpy as np
import pytest

from exeunt.calibration.exit_choice import ExitCosts, choose_exits, net_saving
from exeunt.calibration.thresholds import GateView

FREE = ExitCosts(0.0, 0.0, 0.0)
TARGETS = (0.02, 0.05)
TOKENS, TEXT_BLOCKS, BLOCKS = 24_000, 96, 12


def view(*exits: tuple[float, float]) -> GateView:
    """Exits of (share that is sure, agreement among the others): the sure agree always, the others are never sure."""
    g = np.random.default_rng(0)
    ease = g.random(TOKENS)
    reach, agrees = [], []
    for share, other in exits:
        sure = ease < share
        reach.append(np.where(sure, 0.99, 0.3 * g.random(TOKENS)))
        agrees.append(sure | (g.random(TOKENS) < other))
    where = np.repeat(np.arange(TEXT_BLOCKS), TOKENS // TEXT_BLOCKS)
    return GateView(np.stack(reach), np.stack(reach), np.stack(reach), np.stack(agrees), where, TEXT_BLOCKS)


def test_saving_is_what_leaves_less_what_is_asked() -> None:
    seen = view((0.25, 0.0), (0.5, 0.0))
    first, second = (float((seen.reach[i] > 0.9).mean()) for i in (0, 1))
    free = net_saving(seen, 0.9, (3, 9), BLOCKS, FREE)
    assert free == pytest.approx((first * 9 + (second - first) * 3) / BLOCKS)
    dear = net_saving(seen, 0.9, (3, 9), BLOCKS, ExitCosts(0.5, 0.0, 0.1))
    asked = 1.0 + (1.0 - first)
    assert dear == pytest.approx(free * 0.9 - 0.5 * asked / BLOCKS)


def test_a_projection_in_vain_is_paid_for() -> None:
    seen = view((0.25, 0.0))
    eager = replace(seen, looked=np.ones_like(seen.reach))
    cost = net_saving(seen, 0.9, (6,), BLOCKS, ExitCosts(0.0, 2.0, 0.0)) - net_saving(
        eager, 0.9, (6,), BLOCKS, ExitCosts(0.0, 2.0, 0.0)
    )
    assert cost == pytest.approx(2.0 * float((seen.reach[0] < 0.9).mean()) / BLOCKS)


def test_an_exit_that_nobody_may_take_is_left_out() -> None:
    seen = view((0.0, 0.6), (0.3, 0.0), (0.31, 0.0))
    choice = choose_exits(seen, (3, 6, 10), BLOCKS, ExitCosts(0.2, 1.0, 0.1), TARGETS, 2 * TOKENS, 0.95)
    assert choice.kept == (1,)  # the first lets nobody go, the third hardly anybody more than the second
    assert choice.saving == pytest.approx(max(choice.alone))


def test_two_exits_are_kept_where_both_pay() -> None:
    seen = view((0.2, 0.0), (0.7, 0.0))
    choice = choose_exits(seen, (3, 8), BLOCKS, ExitCosts(0.05, 0.3, 0.1), TARGETS, 2 * TOKENS, 0.95)
    assert choice.kept == (0, 1)
    assert choice.saving > max(choice.alone)


@pytest.mark.parametrize("late", [0.3, 0.9])
def test_where_none_pays_the_one_that_skips_most_is_kept_whatever_the_costs(late: float) -> None:
    seen = view((0.3, 0.0), (late, 0.0))
    dear = (ExitCosts(gate, 5.0, 0.1) for gate in (5.0, 6.0, 7.0))
    chosen = [choose_exits(seen, (3, 8), BLOCKS, costs, TARGETS, 2 * TOKENS, 0.95) for costs in dear]
    assert {choice.kept for choice in chosen} == {(0,) if late == 0.3 else (1,)}
    assert {choice.saving for choice in chosen} == {0.0}


def test_a_shortlist_is_paid_by_everybody_looked_at() -> None:
    """With one a look in vain is cheap, and a token that leaves pays for a look it would not have owed."""
    costs = ExitCosts(0.1, 2.0, 0.1, looks=((64, 0.25), (256, 0.5)))
    assert costs.with_shortlist(64) == ExitCosts(0.1, 0.25, 0.1, leaving=0.25, looks=costs.looks, whole=2.0)
    assert costs.listed == costs.with_shortlist(256)
    assert FREE.listed == FREE
    seen = view((0.25, 0.0))
    looked = np.where(
        np.arange(TOKENS) % 2 == 0, 1.0, seen.reach
    )  # every other token is looked at in any case
    eager = replace(seen, looked=looked)
    free = net_saving(eager, 0.9, (6,), BLOCKS, FREE)
    paid = net_saving(eager, 0.9, (6,), BLOCKS, ExitCosts(0.0, 0.25, 0.0, leaving=0.25))
    assert free - paid == pytest.approx(0.25 * float((looked >= 0.9).mean()) / BLOCKS)


def test_who_is_confirmed_in_vain_pays_for_all_tokens() -> None:
    """Whoever leaves owes the vocabulary in any case: it takes the place of the model's own head."""
    seen = view((0.25, 0.0))
    confirmed = np.where(np.arange(TOKENS) % 3 == 0, 1.0, seen.reach)  # every third is confirmed in any case
    asked = replace(seen, looked=np.ones_like(seen.reach), whole=confirmed)
    free, paid = (
        net_saving(asked, 0.9, (6,), BLOCKS, ExitCosts(0.0, 0.0, 0.0, whole=whole)) for whole in (0, 1.5)
    )
    vain = (confirmed >= 0.9) & (seen.reach < 0.9)
    assert 0.2 < vain.mean() < 0.3
    assert free - paid == pytest.approx(1.5 * float(vain.mean()) / BLOCKS)
