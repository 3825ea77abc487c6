"""Drafting by what it costs and brings: costs are learned, look-ups found, and what does not pay is left alone."""

import math
import random
from copy import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exeunt.compression.variant import Variant
from exeunt.server.drafting import LOOKUP, AdaptiveDrafter, ExitWorth, Proposal
from exeunt.server.lookup import LookUp
from exeunt.server.stage_costs import DraftCosts, LinearCost, StageCosts

CHEAP_ROWS = DraftCosts(True, shallow=0.2e-3, shallow_token=0.01e-3, deep=0.8e-3, token=0.04e-3, gate=0.02e-3)
DEAR_ROWS = DraftCosts(True, shallow=0.2e-3, shallow_token=0.2e-3, deep=0.0, token=0.8e-3, gate=0.02e-3)


def test_costs_are_learned_from_runs_of_any_size() -> None:
    dice, cost = random.Random(1), LinearCost()
    for _ in range(300):
        tokens = dice.choice((1, 2, 4, 9))
        cost.learn(tokens, 1e-3 + 2e-4 * tokens + dice.uniform(0, 2e-5))
    assert cost.base == pytest.approx(1e-3, rel=0.05)
    assert cost.slope == pytest.approx(2e-4, rel=0.05)


def test_costs_follow_a_machine_that_changes() -> None:
    cost = LinearCost()
    for seconds in (1e-3, 3e-3):
        for i in range(400):
            cost.learn(1 + i % 3, seconds)
        assert cost.of(2) == pytest.approx(seconds, rel=0.02)


@given(st.integers(0, 2**32), st.integers(1, 40), st.floats(1.0, 20.0))
def test_a_run_that_was_held_up_counts_as_twice_what_was_expected(
    seed: int, tokens: int, times: float
) -> None:
    dice, cost = random.Random(seed), LinearCost()
    for _ in range(30):
        cost.learn(dice.randint(1, 40), dice.uniform(1e-3, 2e-3))
    clamped, seconds = copy(cost), times * cost.of(tokens)
    cost.learn(tokens, seconds)
    clamped.learn(tokens, min(seconds, 2 * clamped.of(tokens)))
    assert cost == clamped


def test_where_only_one_size_was_seen_more_tokens_are_taken_to_be_cheap() -> None:
    cost = LinearCost()
    for _ in range(50):
        cost.learn(1, 1e-3)
    assert 0 < cost.slope < 0.5e-3
    assert cost.of(1) == pytest.approx(1e-3)
    assert LinearCost().of(3) == 0.0


def test_the_draft_costs_split_the_model_at_the_drafting_exit() -> None:
    costs, variant = StageCosts(), Variant()
    assert not costs.drafting(variant, 0, 2).seen
    for stage, seconds in enumerate((1e-3, 2e-3, 4e-3)):
        for tokens in (1, 3) * 100:
            costs.ran(variant, stage, tokens, seconds)  # costs do not depend on the size: all of it is fixed
    for _ in range(2):  # a first run is not counted
        costs.ticked(1, 5e-4)
        costs.asked(variant, 1, 1, 1e-4)
    drafting = costs.drafting(variant, 1, 2)
    assert drafting.seen
    assert drafting.deep == pytest.approx(4e-3 / 2, rel=0.1)  # shared by two tokens
    assert drafting.shallow == pytest.approx(3e-3 / 2 + 5e-4, rel=0.1)
    assert drafting.token < 2e-4
    assert drafting.gate == pytest.approx(1e-4)


def test_look_up_finds_what_followed_the_longest_match() -> None:
    text = [1, 2, 3, 4, 9, 9, 2, 3, 5, 7, 1, 2, 3]
    look = LookUp()
    assert look.find(text, 0, 4) == (4, 9, 9, 2)
    assert look.find([*text, 4], 1, 2) == (9, 9)  # a draft may be continued
    assert look.find([*text, 8, 8], 0, 4) == ()
    # what is not certain is not looked up in
    assert LookUp().find([5, 6, 7, 5, 6], 3, 4) == ()


def test_look_up_takes_in_nothing_that_may_be_rejected() -> None:
    look_up = LookUp()
    assert look_up.find([1, 2, 3, 7, 8], 2, 5) == ()
    assert look_up.find([1, 2, 3, 4, 3, 7], 0, 5) == ()  # 3 7 stood there as a draft only
    assert look_up.find([1, 2, 3, 4, 3, 7, 1, 2], 0, 3) == (3, 4, 3)


def test_look_up_learns_how_long_a_guess_pays() -> None:
    look = LookUp()
    for _ in range(60):
        look.judged(True)
    length, gain = look.best_length(7, 1e-3, 1e-4)
    assert length == 7
    assert gain > 4e-3
    for _ in range(200):
        look.judged(False)
    assert look.best_length(7, 1e-3, 1e-4) == (0, 0.0)


def outcome(costs: DraftCosts, right: float, steps: int = 2000) -> tuple[AdaptiveDrafter, int]:
    """Run a drafter whose exit's drafts are right so often; count its asks."""
    dice, drafter, asks = random.Random(3), AdaptiveDrafter(lambda: costs), 0
    tokens = [dice.randrange(1000) for _ in range(10)]
    for _ in range(steps):
        drafter.worth.ticked()
        proposal = drafter.propose(tokens, 0, 10)
        drafted = proposal.threshold is not None and right >= proposal.threshold
        asks += proposal.threshold is not None
        drafter.settled([1] if drafted else [], int(drafted and dice.random() < right))
        tokens.append(dice.randrange(1_000_000))
    return drafter, asks


def test_drafting_goes_on_where_it_pays_and_ends_where_it_does_not() -> None:
    assert outcome(CHEAP_ROWS, 0.8)[1] == 2000
    never, sometimes = outcome(DEAR_ROWS, 0.8)[1], outcome(CHEAP_ROWS, 0.1)[1]
    assert never == 0  # nothing is saved however sure the exit is
    assert 16 <= sometimes < 150  # tried, given up, tried again now and then


def test_looked_up_tokens_are_taken_where_they_promise_more() -> None:
    drafter = AdaptiveDrafter(lambda: CHEAP_ROWS)
    text = list(range(20)) * 3
    proposal = drafter.propose(text, 0, 10)
    assert proposal.tokens == tuple(range(len(proposal.tokens)))
    assert proposal.tokens
    for _ in range(100):
        drafter.settled([LOOKUP], 0)
    assert drafter.propose(text, 0, 10).tokens == ()
    assert AdaptiveDrafter(lambda: DraftCosts(seen=False)).propose(text, 0, 10) == Proposal()


@pytest.mark.parametrize("streams", [1, 2, 4, 16])
def test_right_drafts_are_kept_up_by_any_number_of_streams(streams: int) -> None:
    """Outcomes come some steps after the asks; what many streams have asked meanwhile is no verdict."""
    worth = ExitWorth()
    drafters = [AdaptiveDrafter(lambda: CHEAP_ROWS, worth) for _ in range(streams)]
    open_drafts, asks = [0] * streams, 0
    for step in range(400):
        worth.ticked()
        for index, drafter in enumerate(drafters):
            text = list(range(1000 * index, 1000 * index + step + 10))  # nothing to look up
            proposal = drafter.propose(text, open_drafts[index], 10) if open_drafts[index] < 8 else Proposal()
            if proposal.threshold is None:
                drafter.settled([0] * open_drafts[index], open_drafts[index])
                open_drafts[index] = 0
            else:
                asks, open_drafts[index] = asks + 1, open_drafts[index] + 1
    assert asks > 0.8 * 400 * streams


def test_wrong_drafts_are_given_up() -> None:
    worth = ExitWorth()
    for _ in range(40):
        worth.ticked()
        worth.judged(1, -1e-4)
    assert not worth.may_ask()


def _told_as_it_comes(drafter: AdaptiveDrafter, text: list[int], prompt: int) -> list[float]:
    """What is at stake before each token of a text whose steps are all begun ahead."""
    return [drafter.at_stake(text[:end], 0, 1) for end in range(prompt, len(text))]


def _given_up(costs: DraftCosts) -> AdaptiveDrafter:
    """A drafter that asks no exit for long."""
    worth = ExitWorth()
    worth.judged(64, -1.0)
    assert not worth.may_ask()
    return AdaptiveDrafter(lambda: costs, worth)


def test_what_is_at_stake_follows_a_text_that_begins_to_repeat_itself() -> None:
    """Nothing is tried meanwhile: what would have been found is compared with what comes."""
    dice = random.Random(2)
    novel = [dice.randrange(40) for _ in range(400)]  # whose pairs come again, but continue in other ways
    drafter = _given_up(CHEAP_ROWS)
    stakes = _told_as_it_comes(drafter, [*novel, *novel[:200]], 8)
    step = CHEAP_ROWS.shallow + CHEAP_ROWS.deep + CHEAP_ROWS.token
    assert max(stakes[300:390]) < 0.1 * step
    assert min(stakes[-50:]) > step


def test_what_would_be_found_counts_once_where_it_was_tried() -> None:
    looked_up = LookUp()
    text = [1, 2, 3, 4] * 5
    for end in range(6, 12):
        looked_up.promise(text[:end], 7, 1e-3, 1e-5)
    before = looked_up.acceptance
    looked_up.promise(
        text[:15], 7, 1e-3, 1e-5
    )  # three tokens came at once: they were drafts, and are judged as such
    assert looked_up.acceptance == before
    looked_up.promise(text[:16], 7, 1e-3, 1e-5)
    assert looked_up.acceptance > before


def test_an_exit_is_waited_for_until_it_is_known_what_it_brings_and_now_and_then_after() -> None:
    worth = ExitWorth()
    drafter = AdaptiveDrafter(lambda: CHEAP_ROWS, worth)
    text = [*range(50)]
    assert drafter.at_stake(text, 0, 1) == math.inf
    worth.judged(64, 64 * 0.3e-3)
    assert drafter.at_stake(text, 0, 1) == math.inf, "of the same tokens the same"
    assert drafter.at_stake(text[:20], 0, 1) == pytest.approx(0.3e-3)
    for _ in range(65):
        worth.ticked()
    assert drafter.at_stake(text[:21], 0, 1) == math.inf
    assert drafter.propose(text[:21], 0, 5).threshold is not None
    assert drafter.at_stake(text[:22], 0, 1) == pytest.approx(0.3e-3)


def test_nothing_is_at_stake_where_nothing_pays() -> None:
    drafter = _given_up(DEAR_ROWS)
    stakes = _told_as_it_comes(drafter, [*range(200)], 8)
    assert stakes == [0.0] * len(stakes)
    assert AdaptiveDrafter(lambda: DraftCosts(seen=False)).at_stake([1, 2], 0, 1) == 0.0


def test_a_guess_that_was_tried_and_wrong_is_counted_once() -> None:
    drafter = _given_up(CHEAP_ROWS)
    text = [*range(20), *range(10)]
    drafter.at_stake(text, 0, 1)
    assert drafter.propose(text, 0, 10).tokens
    before = drafter.looked_up.acceptance
    drafter.settled([LOOKUP] * 3, 0)
    once = drafter.looked_up.acceptance
    assert once < before
    drafter.at_stake([*text, 99], 0, 1)  # one token came, another than was guessed
    assert drafter.looked_up.acceptance == once


def test_what_is_at_stake_behind_drafts_is_what_it_was_before_them() -> None:
    worth = ExitWorth()
    worth.judged(64, 64 * 0.3e-3)
    drafter = AdaptiveDrafter(lambda: CHEAP_ROWS, worth)
    text = [*range(30)]
    before = drafter.at_stake(text, 0, 1)
    for drafted in (1, 2, 3):
        assert drafter.at_stake([*text, *range(drafted)], drafted, 1) == before
