"""Screening finds exits that are planted in a stack of states, and trains what pays."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from exeunt.calibration.drafting_choice import DEEP_TOKENS, PassCosts
from exeunt.calibration.exit_choice import ExitCosts
from exeunt.calibration.exit_fit import ExitData
from exeunt.calibration.exit_placement import is_screened, named_blocks
from exeunt.calibration.exit_screen import ExitScreen, ScreenSize, kept_blocks, screen_exits, screen_work
from exeunt.compression.exits import ExitNorm

H, V, BLOCKS = 16, 24, 12
FIT, SELECT, ROW = 2_000, 3_000, 500
NORM = ExitNorm("layer", torch.ones(H), torch.zeros(H), 1e-5)
RISKS = (0.02, 0.05)
CHEAP = ExitCosts(gate=0.1, projection=0.2, skipped_kv=0.1)
PASSES = PassCosts(
    gate=0.02,
    projection=0.02,
    shallow={depth: depth / BLOCKS for depth in range(1, BLOCKS)},
    deep={depth: ((BLOCKS - depth) / BLOCKS,) * len(DEEP_TOKENS) for depth in range(1, BLOCKS)},
)
CODES = torch.nn.functional.normalize(torch.randn(V, H, generator=torch.Generator().manual_seed(0)), dim=1)
ROWS = [torch.zeros(ROW, dtype=torch.int64)] * (SELECT // ROW)


def project(state: torch.Tensor) -> torch.Tensor:
    return 3.0 * state @ CODES.T


def stack(decided: dict[int, float]) -> ExitData:
    """States behind every block: `decided[k]` of the tokens are decided by block k; all are in the end.

    A token that is decided has its code in the state, one that is not has noise there, of which no head is sure.
    """
    g = torch.Generator().manual_seed(1)
    tokens = FIT + SELECT
    kind, ease = torch.randint(V, (tokens,), generator=g), torch.rand(tokens, generator=g)
    final = CODES[kind] + 0.02 * torch.randn(tokens, H, generator=g)
    states, share = {}, 0.0
    for block in range(BLOCKS - 1):
        share = max(share, decided.get(block, 0.0))
        vague = 0.1 * torch.randn(tokens, H, generator=g) + CODES.mean(0)
        states[block] = torch.where((ease < share)[:, None], final, vague)
    top = project(NORM(final)).argmax(-1)
    return ExitData(states, final, top, FIT)


def screened(
    data: ExitData,
    trained: int = 2,
    costs: ExitCosts = CHEAP,
    passes: PassCosts | None = PASSES,
    named: tuple[int, ...] = (),
    *,
    certify: bool = True,
) -> ExitScreen:
    size = ScreenSize(tokens=SELECT, trained=trained)
    return screen_exits(project, NORM, data, ROWS, BLOCKS, costs, passes, RISKS, size, named, certify=certify)


def test_the_block_behind_which_half_of_the_tokens_are_decided_is_found() -> None:
    screen = screened(stack({5: 0.5}), trained=1, passes=None)
    assert screen.trained == (5,)
    planted, before = screen.exits[5], screen.exits[4]
    assert planted.reason == "saving, place 1"
    assert planted.leaving == pytest.approx((0.5, 0.5), abs=0.06)
    assert planted.separability > 0.95
    assert before.leaving == pytest.approx((0.0, 0.0), abs=0.02)
    expected = planted.leaving[0] * 6 * 0.9 - 0.1 - 0.2 * (1 - planted.leaving[0])
    assert planted.saving == pytest.approx(expected / BLOCKS, abs=0.02)


def test_certified_and_drafting_exits_are_looked_for_apart() -> None:
    """Three in ten tokens are decided early, which drafts fastest, and nine late, which saves most at dear gates."""
    dear = ExitCosts(gate=0.5, projection=1.0, skipped_kv=0.1)
    screen = screened(stack({1: 0.3, 8: 0.9}), costs=dear)
    assert screen.trained == (1, 8)
    assert [screen.exits[block].reason for block in screen.trained] == [
        "draft speed, place 1",
        "saving, place 1",
    ]
    assert screen.exits[1].draft_speed == max(each.draft_speed for each in screen.exits) > 1.0
    assert screen.exits[1].saving < screen.exits[8].saving


def test_dear_gates_move_the_choice_deeper() -> None:
    data = stack({1: 0.3, 6: 0.8})
    assert screened(data, trained=1, costs=ExitCosts(0.0, 0.0, 0.0), passes=None).trained == (6,)
    assert screened(data, trained=1, costs=ExitCosts(0.0, 8.0, 0.0), passes=None).trained == (6,)
    early = stack({1: 0.5, 6: 0.8})
    assert screened(early, trained=1, costs=ExitCosts(0.0, 0.0, 0.0), passes=None).trained == (1,)
    assert screened(early, trained=1, costs=ExitCosts(0.0, 8.0, 0.0), passes=None).trained == (6,)


def test_named_blocks_are_trained_beside_those_found() -> None:
    screen = screened(stack({5: 0.5}), trained=1, passes=None, named=(9,))
    assert screen.trained == (5, 9)
    assert screen.exits[9].reason == "named"


def test_where_only_the_drafting_exit_is_open_nothing_is_trained_for_saving() -> None:
    screen = screened(stack({1: 0.35, 8: 0.9}), trained=1, named=(9,), certify=False)
    assert screen.trained == (1, 9)


def test_a_rotated_stack_is_seen_through_the_ridge_map() -> None:
    """Where states are turned against the last block's, the model's own head sees nothing and the map everything."""
    data = stack({5: 0.5})
    turn = torch.linalg.qr(torch.randn(H, H, generator=torch.Generator().manual_seed(3))).Q
    turn = turn - turn.mean(1, keepdim=True)  # what the norm takes off anyway
    turned = replace(data, states={block: states @ turn.T for block, states in data.states.items()})
    screen = screened(turned, trained=1, passes=None)
    found = screen.exits[5]
    assert found.start == "ridge"
    assert found.agreement < 0.2
    assert found.ridge_agreement > 0.45
    assert screen.trained == (5,)


def test_the_work_done_is_the_work_planned_and_part_of_the_split_is_enough() -> None:
    data, size = stack({5: 0.5}), ScreenSize(tokens=1_200, trained=1)
    done: list[int] = []
    screen = screen_exits(project, NORM, data, ROWS, BLOCKS, CHEAP, None, RISKS, size, advance=done.append)
    assert sum(done) == screen_work(data, ROWS, size)
    assert screen.tokens == 2 * ROW, "whole rows"
    assert screen.trained == (5,)


def test_the_screen_is_the_same_every_time() -> None:
    data = stack({3: 0.2, 5: 0.5})
    assert screened(data) == screened(data)


def test_states_are_kept_behind_all_blocks_as_far_as_the_disk_may_be_filled() -> None:
    assert kept_blocks(12, 1000, 16, 4) == tuple(range(11))
    bytes_each = 1000 * 16 * 4
    assert kept_blocks(12, 1000, 16, 4, 11 * bytes_each) == tuple(range(11))
    assert kept_blocks(12, 1000, 16, 4, 10 * bytes_each) == (0, 2, 4, 6, 8, 10)
    assert kept_blocks(12, 1000, 16, 4, 4 * bytes_each) == (1, 4, 7, 10)
    assert kept_blocks(12, 1000, 16, 4, 1) == (10,)
    assert kept_blocks(2, 1000, 16, 4) == (0,)
    assert kept_blocks(1, 1000, 16, 4) == ()
    for room in range(1, 12):
        assert len(kept_blocks(12, 1000, 16, 4, room * bytes_each)) <= room


def test_what_is_named_and_what_is_open() -> None:
    assert named_blocks("auto", "auto") == ()
    assert named_blocks((7, 2), 4) == (2, 4, 7)
    assert named_blocks((7, 2), "none") == (2, 7)
    assert is_screened("auto", "none")
    assert is_screened((3,), "auto")
    assert not is_screened((3,), 2)
    assert not is_screened((3,), "none")


def test_top_probabilities_of_certainty_do_not_break_the_regression() -> None:
    data = stack({0: 1.0})
    sharp = replace(data, top=project(NORM(data.final)).argmax(-1))
    screen = screen_exits(
        lambda state: 1e4 * project(state), NORM, sharp, ROWS, BLOCKS, CHEAP, PASSES, RISKS, ScreenSize()
    )
    assert all(np.isfinite(each.saving) and np.isfinite(each.draft_speed) for each in screen.exits)
