"""How strict a shortlist is follows from what confirming in vain costs and what turning away loses, both planted."""

import numpy as np
import pytest
import torch

from exeunt.calibration.exit_choice import ExitCosts
from exeunt.calibration.exit_worth import LIST_RATIOS, WORTH, Confidences, ExitWorth, choose_list_ratio

TOKENS, BLOCKS, DEPTH = 20_000, 12, 6


def worth(whole: float, look: float = 0.0, gate: float = 0.0) -> ExitWorth:
    costs = ExitCosts(gate, look, 0.0, leaving=look, whole=whole)
    return ExitWorth(DEPTH, BLOCKS, costs, (0.0,))


def confidences(blind: float) -> Confidences:
    """Half of the tokens may leave, and all logits know which; the list does not of a share `blind`, of either half.

    It thinks least of those, less than of others that must stay.
    """
    g = torch.Generator().manual_seed(0)
    good = torch.arange(TOKENS) % 2 == 0
    unsure = torch.rand(TOKENS, generator=g) < blind
    listed = torch.where(unsure, torch.tensor(0.15), torch.where(good, torch.tensor(0.95), torch.tensor(0.3)))
    confirmed = torch.where(good, torch.tensor(0.9), torch.tensor(0.2))
    return Confidences(torch.ones(TOKENS), listed, confirmed, good)


def test_the_saving_is_what_a_plain_count_says() -> None:
    """Half leave and save six blocks; as many are asked in vain; everybody pays gate and look."""
    found = confidences(0.2)
    reach, looked, whole = found.thresholds(0.5)
    left, asked = (float((each >= 0.3 - 1e-6).float().mean()) for each in (reach, whole))
    assert (left, asked) == (0.5, 1.0)
    paid = worth(1.5, 0.25, 0.125)
    expected = (0.5 * (6 - 0.25) - 0.125 - 0.5 * 0.25 - 0.5 * 1.5) / BLOCKS
    assert paid.saving(reach, looked, whole, found.agrees) == pytest.approx(expected)
    assert (
        worth(1.5).saving(-torch.ones(4), torch.ones(4), torch.ones(4), torch.zeros(4, dtype=torch.bool))
        == 0.0
    )


def test_a_list_that_knows_is_as_strict_as_can_be() -> None:
    ratio, saving = choose_list_ratio(confidences(0.0), worth(1.5))
    assert ratio == 1.0
    assert saving == pytest.approx(0.5 * 6 / BLOCKS)


def test_a_blind_list_lets_pass_where_confirming_is_cheap() -> None:
    """At 1.0 a third of who may leave stays; at 0.7 they leave, and as many as leave are asked in vain."""
    found = confidences(1 / 3)
    assert choose_list_ratio(found, worth(0.5))[0] == 0.7
    assert choose_list_ratio(found, worth(20.0))[0] == 1.0, "unless that costs more than leaving saves"


def test_of_ratios_that_save_about_the_same_the_strictest_is_taken() -> None:
    found, cheap = confidences(0.03), worth(0.0)
    savings = {ratio: cheap.saving(*found.thresholds(ratio), found.agrees) for ratio in (0.7, 1.0)}
    assert 0.0 < savings[0.7] - savings[1.0] < WORTH
    assert choose_list_ratio(found, cheap)[0] == 1.0


@pytest.mark.parametrize("ratio", LIST_RATIOS)
def test_a_token_leaves_up_to_the_threshold_that_every_step_lets_it_pass(ratio: float) -> None:
    g = torch.Generator().manual_seed(1)
    screened, listed, confirmed = torch.rand(3, 500, generator=g, dtype=torch.float64)
    found = Confidences(screened, listed, confirmed, torch.ones(500, dtype=torch.bool))
    for threshold in np.linspace(0.05, 0.95, 7):
        asked = (screened >= threshold) & (listed >= ratio * threshold)
        assert torch.equal(found.whole(ratio) >= threshold, asked)
        assert torch.equal(found.reach(ratio) >= threshold, asked & (confirmed >= threshold))
