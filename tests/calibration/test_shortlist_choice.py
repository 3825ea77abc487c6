"""The shortlist's size follows from what looks cost and what they show, both planted."""

import pytest
import torch
from torch import Tensor

from exeunt.calibration.exit_choice import ExitCosts
from exeunt.calibration.exit_training import Labelled, TrainedHead
from exeunt.calibration.exit_worth import WORTH
from exeunt.calibration.shortlist_choice import (
    choose_shortlist,
    most_frequent,
    planned_shortlist_tokens,
    shortlist_sizes,
)
from exeunt.compression.norm import Norm

V, TOKENS, BLOCKS = 512, 3_000, 12
H, LENGTH = V + 1, 12.0
NORM = Norm("rms", torch.full((H,), LENGTH / H**0.5), None, 1e-12)
OWN = TrainedHead(NORM, torch.zeros(H, H), 0.5, 0.5, 0.5)
SIZES = shortlist_sizes(V)


def project(state: Tensor) -> Tensor:
    return state[:, :V]


def sure_of(tokens: Tensor, seed: int) -> Labelled:
    """States whose logits are about `tokens` by a margin, and full depth that agrees the more the larger that is."""
    g = torch.Generator().manual_seed(seed)
    margin = torch.rand(len(tokens), generator=g)
    hidden = torch.randn(len(tokens), H, generator=g) * 0.1
    hidden[torch.arange(len(tokens)), tokens] += 1.0 + 6.0 * margin
    # all are of one length, so that the norm does not let other logits tell how large the first is
    hidden[:, V] = (LENGTH**2 - hidden[:, :V].square().sum(1)).sqrt()
    agrees = torch.rand(len(tokens), generator=g) < 0.3 + 0.7 * (margin > 0.5)
    return Labelled(hidden, torch.where(agrees, tokens, (tokens + 7) % V))


def frequent(share: float, seed: int) -> Tensor:
    """Tokens of which `share` are among the first 60, the others anywhere."""
    g = torch.Generator().manual_seed(seed)
    few = torch.randint(60, (TOKENS,), generator=g)
    return torch.where(torch.rand(TOKENS, generator=g) < share, few, torch.randint(V, (TOKENS,), generator=g))


def costs_of(look: float, projection: float) -> ExitCosts:
    """Of a look in vain, a shortlist's by its share of the vocabulary."""
    return ExitCosts(0.1, projection, 0.1, looks=tuple((size, look * size / V) for size in SIZES))


def chosen(
    share: float, look: float, projection: float, counted: float = 1.2
) -> tuple[int | None, dict[int | None, float]]:
    """What is chosen at measured costs of looks, and where these do not tell by those that are `counted`."""
    told: list[int] = []
    choice = choose_shortlist(
        {7: OWN},
        lambda _block: sure_of(frequent(share, 2), 3),
        frequent(share, 1),
        V,
        project,
        BLOCKS,
        costs_of(look, projection),
        costs_of(counted, counted),
        (0.05, 0.1),
        told.append,
    )
    assert sum(told) == planned_shortlist_tokens(1, TOKENS)
    size = None if choice.shortlist is None else len(choice.shortlist)
    savings = dict(choice.savings)
    assert savings[size] >= max(savings.values()) - WORTH
    return size, savings


def test_sizes_are_shares_of_the_vocabulary() -> None:
    assert SIZES == (64, 128)
    assert shortlist_sizes(4096) == (256, 512, 1024)
    assert shortlist_sizes(32_000) == (2_000, 4_000, 8_000)
    assert shortlist_sizes(120) == ()


def test_the_most_frequent_tokens_are_those_counted() -> None:
    top = torch.tensor([5, 5, 5, 2, 2, 9, 1, 1, 1, 1])
    assert most_frequent(top, 12, 3).ids.tolist() == [1, 2, 5]
    assert most_frequent(top, 12, 6).ids.tolist() == [0, 1, 2, 3, 5, 9], "unseen tokens by their number"


def test_dear_looks_want_a_shortlist_where_a_few_tokens_are_most_of_the_text() -> None:
    size, savings = chosen(share=0.99, look=2.0, projection=2.0)
    assert size == 64
    assert savings[64] - savings[None] > 0.04


def test_looks_that_cost_nothing_want_the_whole_vocabulary() -> None:
    size, savings = chosen(share=0.5, look=0.0, projection=0.0, counted=0.0)
    assert size is None
    assert savings[None] > savings[128] > savings[64]


def test_of_sizes_that_save_about_the_same_the_one_that_computes_least_is_kept() -> None:
    """Prices at which the whole vocabulary saves a little more, or a little less: measured costs vary so much."""
    found = [chosen(share=0.99, look=look, projection=look) for look in (0.0, 0.1, 0.3)]
    gains = [savings[64] - savings[None] for _, savings in found]
    assert -WORTH < gains[0] < 0.0 < gains[1] < gains[2] < WORTH
    assert [size for size, _ in found] == [64, 64, 64]
    free = [chosen(share=0.99, look=look, projection=look, counted=0.0)[0] for look in (0.0, 0.1, 0.3)]
    assert free == [None, None, None], "if looks computed nothing, all logits would decide best"


def test_text_of_all_tokens_wants_no_list() -> None:
    """What a list does not show looks like any other token to it: it lets pass whom it should turn away."""
    size, savings = chosen(share=0.0, look=0.3, projection=0.3)
    assert size is None
    assert savings[64] < savings[None]
    assert savings[128] < savings[None]


def test_a_list_that_shows_an_eighth_of_the_text_loses_little_where_it_is_confirmed() -> None:
    """Where looks cost nothing it may let everybody pass; by its own logits alone it would save a fifth less."""
    _, savings = chosen(share=0.0, look=0.0, projection=0.0)
    assert savings[None] - 0.005 < savings[64] < savings[None]


def test_the_saving_is_what_a_plain_count_says() -> None:
    """Gates and looks of all tokens are paid; those that leave save the blocks behind, less their keys and values."""
    free = dict(chosen(share=1.0, look=0.0, projection=0.0)[1])[None]
    paid = dict(chosen(share=1.0, look=0.0, projection=1.2)[1])[None]
    # 4 blocks at 0.9 each less a gate of 0.1; the look is paid by those who stay: with a share s,
    share = (free * BLOCKS + 0.1) / (4 * 0.9)
    assert paid == pytest.approx((share * 4 * 0.9 - 0.1 - (1 - share) * 1.2) / BLOCKS)
    assert 0.3 < share < 0.7
