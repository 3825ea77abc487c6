"""Exit costs are those of the machine: measured on a real decode batch, and only their ratios are used."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from exeunt.calibration import exit_costs
from exeunt.calibration.exit_choice import ExitCosts
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.compression.decoder import Decoder

from .conftest import BLOCKS, random_exit


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
