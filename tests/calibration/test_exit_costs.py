"""Exit costs are those of the machine: measured on a real decode batch, and only their ratios are used."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from exeunt.calibration import exit_costs
from exeunt.calibration.drafting_choice import DEEP_TOKENS
from exeunt.calibration.exit_choice import ExitCosts
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.compression.decoder import Decoder
from tests.calibration.conftest import BLOCKS, random_exit


def test_every_part_runs_and_costs_something(decoder: Decoder) -> None:
    calls = decoder.block_calls.tokens[0]
    costs = exit_costs.measure_exit_costs(ForcedModel(decoder, "int4", (random_exit(1, 1),)))
    assert all(cost > 0 for cost in dataclasses.astuple(costs))
    assert decoder.block_calls.tokens[0] - calls == 2 * exit_costs.ROUNDS * exit_costs.ROWS


def test_costs_are_in_units_of_a_block(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(parts: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
        return dict(zip(parts, (BLOCKS * 2.0, 0.5, 3.0, BLOCKS * 0.2), strict=True))

    monkeypatch.setattr(exit_costs, "_in_turn", timed)
    costs = exit_costs.measure_exit_costs(ForcedModel(decoder, "full", (random_exit(1, 1),)))
    assert dataclasses.astuple(costs) == pytest.approx(dataclasses.astuple(ExitCosts(0.25, 1.5, 0.1)))


def test_passes_of_drafts_cost_what_they_run(decoder: Decoder) -> None:
    calls = decoder.block_calls.tokens[BLOCKS - 1]
    costs = exit_costs.measure_pass_costs(ForcedModel(decoder, "int4", (random_exit(1, 1),)), (1, 3))
    assert set(costs.shallow) == set(costs.deep) == {1, 3}
    assert 0 < costs.shallow[1] < costs.shallow[3] < 1
    assert costs.deep[1][0] > costs.deep[3][0] > 0
    assert all(len(times) == len(DEEP_TOKENS) for times in costs.deep.values())
    assert decoder.block_calls.tokens[BLOCKS - 1] - calls == 2 * exit_costs.ROUNDS * sum(DEEP_TOKENS)


def test_passes_are_in_units_of_a_token(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block costs 2 and a call 1; of nine tokens each costs half as much again."""
    known = {f"blocks {n}": 1.0 + BLOCKS * 2.0 * (1 + 0.5 * (n - 1)) for n in DEEP_TOKENS}
    known |= {f"head {n}": 0.5 for n in DEEP_TOKENS}
    known |= {"embedding": 0.5, "block": 3.0, "gate": 1.0, "projecting gate": 3.0}

    def timed(parts: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
        assert set(parts) == set(known)
        return known

    monkeypatch.setattr(exit_costs, "_in_turn", timed)
    costs = exit_costs.measure_pass_costs(ForcedModel(decoder, "full", (random_exit(1, 1),)), (1,))
    token = 0.5 + (1.0 + BLOCKS * 2.0) + 0.5
    assert costs.gate == pytest.approx(1.0 / token)
    assert costs.projection == pytest.approx(2.0 / token)
    assert costs.shallow[1] == pytest.approx((0.5 + 1.0 + 2.0) / token)
    wanted = [(1.0 + (BLOCKS - 1) * 2.0 * (1 + 0.5 * (n - 1)) + 0.5) / token for n in DEEP_TOKENS]
    assert costs.deep[1] == pytest.approx(wanted)
