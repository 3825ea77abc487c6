"""Exit costs are those of the machine: measured on a real decode batch, and only their ratios are used."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from exeunt.calibration import exit_costs
from exeunt.calibration.drafting_choice import DEEP_TOKENS
from exeunt.calibration.exit_placement import untrained_exit
from exeunt.calibration.gate_training import TOPS
from exeunt.calibration.shortlist_choice import shortlist_sizes
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.compression.decoder import Decoder
from exeunt.compression.exit_output import Shortlist
from exeunt.compression.exits import ExitNorm
from tests.calibration.conftest import BLOCKS, HIDDEN, confirmed_exit, random_exit


def test_every_part_runs_and_costs_something(decoder: Decoder) -> None:
    calls = decoder.block_calls.tokens[0]
    costs = exit_costs.measure_exit_costs(ForcedModel(decoder, "int4", (random_exit(1, 1),)))
    assert min(costs.gate, costs.skipped_kv) > 0
    assert (
        costs.projection >= 0
    )  # what a look takes beyond a gate, and of a tiny model the clock may not tell them apart
    assert costs.leaving == 0.0
    assert [size for size, _ in costs.looks] == list(shortlist_sizes(decoder.spec.vocab_size)) != []
    assert decoder.block_calls.tokens[0] - calls == 2 * exit_costs.ROUNDS * exit_costs.ROWS


def test_costs_are_in_units_of_a_block(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(parts: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
        known = {"blocks": BLOCKS * 2.0, "gate": 0.5, "skipped_kv": BLOCKS * 0.2, "look": 3.5}
        known |= {"look at 12": 0.9} | {f"look at {size}": 1.1 for size in sizes}
        return {part: known[part] for part in parts}

    sizes = shortlist_sizes(decoder.spec.vocab_size)
    monkeypatch.setattr(exit_costs, "_in_turn", timed)
    head = replace(confirmed_exit(1, 1), shortlist=Shortlist(torch.arange(12)))
    costs = exit_costs.measure_exit_costs(ForcedModel(decoder, "full", (head,)))
    assert (costs.gate, costs.projection, costs.skipped_kv) == pytest.approx((0.25, 1.5, 0.1))
    assert dict(costs.looks) == pytest.approx({12: 0.2} | dict.fromkeys(sizes, 0.3))
    listed = costs.with_shortlist(12)
    assert (listed.projection, listed.leaving) == pytest.approx((0.2, 0.2)), "who leaves was looked at too"
    assert listed.whole == pytest.approx(1.5), "who is confirmed in vain pays for all tokens besides"
    assert costs.with_shortlist(None) == costs


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
    known |= {"embedding": 0.5, "block": 3.0, "gate": 1.0, "look": 3.0}
    known |= {f"look at {size}": 1.5 for size in shortlist_sizes(decoder.spec.vocab_size)}

    def timed(parts: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
        assert set(parts) == set(known)
        return known

    monkeypatch.setattr(exit_costs, "_in_turn", timed)
    costs = exit_costs.measure_pass_costs(ForcedModel(decoder, "full", (random_exit(1, 1),)), (1,))
    token = 0.5 + (1.0 + BLOCKS * 2.0) + 0.5
    assert costs.gate == pytest.approx(1.0 / token)
    assert costs.projection == pytest.approx(2.0 / token)
    listed = costs.with_shortlist(shortlist_sizes(decoder.spec.vocab_size)[0])
    assert (listed.projection, listed.whole) == pytest.approx((0.5 / token, 2.0 / token))
    assert costs.shallow[1] == pytest.approx((0.5 + 1.0 + 2.0) / token)
    wanted = [(1.0 + (BLOCKS - 1) * 2.0 * (1 + 0.5 * (n - 1)) + 0.5) / token for n in DEEP_TOKENS]
    assert costs.deep[1] == pytest.approx(wanted)


def test_the_exit_that_is_timed_is_as_large_as_a_trained_one() -> None:
    norm = ExitNorm("rms", torch.ones(HIDDEN), None, 1e-6)
    head = untrained_exit(norm, 1, 24)
    assert head.probe.hidden_weight.shape == (24, HIDDEN)
    assert head.judge is not None
    assert head.judge.top_weight.shape == (TOPS, 24)
    assert head.adapter.shape == (HIDDEN, HIDDEN)
