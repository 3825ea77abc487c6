"""What is counted equals what a hand counts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from exeunt.calibration.compute import (
    COUNTED_CONTEXT,
    ComputeCost,
    Passage,
    asked_cost,
    counted_costs,
    looked_cost,
)
from exeunt.compression.decoder import Decoder
from exeunt.compression.exit_output import Shortlist
from exeunt.compression.exits import ExitConfirmation, ExitJudge
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.variant import SkippedKV
from tests.calibration.conftest import BLOCKS, HIDDEN, VOCAB, random_exit

KV = 16  # one key head of 16
LINEARS = (
    HIDDEN * (32 + 2 * KV) + 32 * HIDDEN + 3 * HIDDEN * 48 + 2 * 2 * HIDDEN
)  # two heads of 16, two norms
HEAD = HIDDEN * VOCAB + 2 * HIDDEN
ASKED = 2 * HIDDEN + HIDDEN * HIDDEN + 8 * HIDDEN + 8
LOOK = HIDDEN * VOCAB
KV_ONLY = HIDDEN * 2 * KV + 2 * HIDDEN  # of one block: keys and values, and the norm in front of them


def attention(*positions: int) -> int:
    """Scores and weighted sum of two heads of 16 over all positions up to each."""
    return sum(2 * 32 * (position + 1) for position in positions)


def test_full_depth_is_every_block_and_the_head(decoder: Decoder) -> None:
    cost = ComputeCost(decoder.spec)
    positions = np.array([0, 9])
    wanted = [BLOCKS * (LINEARS + attention(position)) + HEAD for position in (0, 9)]
    assert cost.full_depth(positions).tolist() == wanted
    assert cost.blocks(positions, np.array([0, 2])).tolist() == [0, 2 * (LINEARS + attention(9))]


def test_a_window_ends_what_attention_costs(decoder: Decoder) -> None:
    spec = replace(decoder.spec, windows=(None, 4, None, 4))
    cost = ComputeCost(spec)
    assert cost.blocks(np.array([9]), BLOCKS).tolist() == [4 * LINEARS + 2 * attention(9) + 2 * attention(3)]


def test_a_linear_block_costs_its_two_matrices_and_has_no_keys(decoder: Decoder) -> None:
    block = LinearBlock(3, torch.zeros(5, HIDDEN), torch.zeros(HIDDEN, 5), torch.zeros(HIDDEN))
    cost = ComputeCost(decoder.spec, (random_exit(1, 1),), block)
    assert cost.full_depth(np.array([2])).tolist() == [3 * (LINEARS + attention(2)) + 2 * 5 * HIDDEN + HEAD]
    assert cost.done(passage([0], [[True]], [[True]]), "propagate").tolist() == [
        2 * (LINEARS + attention(7)) + ASKED + LOOK + KV_ONLY
    ]


def test_a_shortlist_is_charged_for_every_look_and_the_vocabulary_for_who_leaves(decoder: Decoder) -> None:
    plain = random_exit(1, 1)
    judge = ExitJudge(torch.zeros(4, 8), torch.zeros(8), torch.zeros(8), torch.zeros(()))
    listed = replace(plain, judge=judge, shortlist=Shortlist(torch.arange(20)))
    look = HIDDEN * 20 + 4 * 8 + 8
    assert looked_cost(listed, decoder.spec) == look
    cost = ComputeCost(decoder.spec, (listed,))
    walk = passage([0, 1, 1], [[True, True, True]], [[True, True, False]], [[True, False, False]])
    block = LINEARS + attention(7)
    assert cost.done(walk, "propagate").tolist() == [
        2 * (block + KV_ONLY) + ASKED + look + LOOK,
        4 * block + ASKED + look + HEAD,
        4 * block + ASKED + HEAD,
    ]
    last = ExitConfirmation(
        ExitJudge(torch.zeros(3, 8), torch.zeros(8), torch.zeros(8), torch.zeros(())), torch.zeros(4), 0.5
    )
    cost = ComputeCost(decoder.spec, (replace(listed, confirmation=last),))
    confirmed = LOOK + 3 * 8 + 8
    walk = passage([0, 1, 1], [[True] * 3], [[True, True, False]], [[True, True, False]])
    assert cost.done(walk, "propagate").tolist() == [
        2 * (block + KV_ONLY) + ASKED + look + confirmed,
        4 * block + ASKED + look + confirmed + HEAD,
        4 * block + ASKED + HEAD,
    ]


def passage(
    left: list[int],
    asked: list[list[bool]],
    projected: list[list[bool]],
    whole: list[list[bool]] | None = None,
) -> Passage:
    """Without a shortlist whoever is looked at is projected onto the whole vocabulary."""
    looks = [np.array(each) for each in (asked, projected, projected if whole is None else whole)]
    return Passage(np.full(len(left), 7), np.array(left), *looks)


def test_counted_costs_are_of_a_block_behind_the_counted_context(decoder: Decoder) -> None:
    spec = decoder.spec
    context = min(COUNTED_CONTEXT, spec.max_position_embeddings)
    block, judge = LINEARS + attention(context - 1), (3 + 1) * 8
    found = counted_costs(spec, 8, 3, (4, 6))
    assert found.gate == pytest.approx(ASKED / block)
    assert found.projection == pytest.approx((LOOK + judge) / block)
    assert found.skipped_kv == pytest.approx(KV_ONLY / block)
    assert dict(found.looks) == pytest.approx({size: (HIDDEN * size + judge) / block for size in (4, 6)})
    assert (found.leaving, found.whole) == (0.0, 0.0)


def test_exits_are_charged_for_every_question_and_every_look(decoder: Decoder) -> None:
    exits = (random_exit(0, 1), random_exit(2, 2))
    cost = ComputeCost(decoder.spec, exits)
    assert asked_cost(exits[0]) == ASKED
    assert looked_cost(exits[0], decoder.spec) == LOOK
    block = LINEARS + attention(7)
    walk = passage(
        [0, 1, 2, 2],
        [[True, True, True, False], [False, True, True, False]],
        [[True, True, True, False], [False, True, False, False]],
    )
    assert cost.done(walk, "propagate").tolist() == [
        block + ASKED + LOOK + 3 * KV_ONLY,
        3 * block + 2 * (ASKED + LOOK) + KV_ONLY,
        4 * block + 2 * ASKED + LOOK + HEAD,
        4 * block + HEAD,
    ]
    assert cost.done(walk, "backfill").tolist() == [
        4 * block + ASKED + LOOK,
        4 * block + 2 * (ASKED + LOOK),
        4 * block + 2 * ASKED + LOOK + HEAD,
        4 * block + HEAD,
    ]


@pytest.mark.parametrize("skipped_kv", ["propagate", "backfill"])
def test_who_never_asks_pays_what_full_depth_costs(decoder: Decoder, skipped_kv: SkippedKV) -> None:
    cost = ComputeCost(decoder.spec, (random_exit(1, 1),))
    idle = passage([1, 1], [[False, False]], [[False, False]])
    assert np.array_equal(cost.done(idle, skipped_kv), cost.full_depth(idle.positions))
