"""The simulation of stage scheduling: its costs, its policies, and that the page says what the results say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.simulate_stages import __main__ as command
from scripts.simulate_stages.cost import BF16, H200, INT4, MISTRAL_7B, Formats, StageCosts
from scripts.simulate_stages.policy import StagePolicy, StageQueue
from scripts.simulate_stages.simulation import POLICIES, SCREENED, Mode, Policy, Scenario, simulate
from scripts.simulate_stages.sweep import costs_of, from_columns, measured
from scripts.simulate_stages.tables import tables

ROOT = Path(__file__).parents[2]
QUEUES: tuple[Policy, ...] = ("fullest", "least waste")
BARE = replace(MISTRAL_7B, head_parameters=0.0, gate_parameters=0.0, kv_share=0.0)
NO_CACHE = Formats("weights alone", 2.0, 1e-9)


def bare_costs(depth: int, *, bandwidth: float = np.inf, peak: float = np.inf) -> StageCosts:
    """Nothing but blocks, without launches; read or computed, as is not infinitely fast."""
    machine = replace(H200, bandwidth=bandwidth, peak=peak, launch_s=0.0)
    return StageCosts(machine, BARE, NO_CACHE, context=1, depth=depth)


class TestCosts:
    def test_a_step_of_one_stream_reads_the_weights(self) -> None:
        launches = (32 * 5 + 3) * 1.3e-6
        for formats, size in ((BF16, 14.2e9), (INT4, 4.2e9)):
            costs = StageCosts(H200, MISTRAL_7B, formats, context=1, depth=16)
            assert costs.full(1) == pytest.approx(size / (0.85 * 4.8e12) + launches, rel=0.005)

    def test_stages_add_up_to_the_model(self) -> None:
        costs = costs_of("int4", 1024)
        assert costs.shallow(64, 0, 0) + costs.deep(64, 64, 64) == pytest.approx(costs.full(64))

    def test_a_sequence_reads_its_keys_once_for_all_its_tokens(self) -> None:
        costs = costs_of("bf16", 4096)
        assert costs.deep(32, 64, 32) == pytest.approx(costs.deep(32, 32, 32))
        assert costs.deep(64, 64, 32) > 1.2 * costs.deep(32, 64, 32)

    def test_memory_holds_what_the_weights_leave(self) -> None:
        assert costs_of("bf16", 4096).most_sequences == 236
        assert costs_of("int4", 256).most_sequences > 10_000

    @pytest.mark.parametrize("depth", [0, 32])
    def test_an_exit_lies_within(self, depth: int) -> None:
        with pytest.raises(ValueError, match="does not cut"):
            bare_costs(depth)


class TestPolicy:
    @staticmethod
    def choose(policy: StagePolicy, rows: tuple[int, ...], waited: tuple[float, ...] = (0, 0, 0)) -> int:
        queues = [StageQueue() for _ in rows]
        for queue, count, age in zip(queues, rows, waited, strict=False):
            queue.put(np.arange(count), count, -age)
        return policy.choose(queues, 0.0)

    def test_fullest_counts_rows_where_weights_are_read_and_goes_deep_on_a_tie(self) -> None:
        policy = StagePolicy("fullest", lambda stage, rows, tokens: (1.0, 3.0)[stage], 8, np.inf)
        assert self.choose(policy, (5, 3)) == 0
        assert self.choose(policy, (4, 4)) == 1

    def test_least_waste_weighs_rows_by_what_a_half_empty_run_loses(self) -> None:
        policy = StagePolicy("least waste", lambda stage, rows, tokens: (1.0, 3.0)[stage], 8, np.inf)
        assert self.choose(policy, (3, 5)) == 0  # wastes 5/8 of 1; the other 3/8 of 3
        assert self.choose(policy, (2, 6)) == 1  # wastes 6/8 of 1; the other 2/8 of 3: a tie

    @pytest.mark.parametrize("rule", QUEUES)
    def test_where_arithmetic_is_all_nothing_is_gained_by_waiting(self, rule: Policy) -> None:
        policy = StagePolicy(
            "fullest" if rule == "fullest" else "least waste", lambda s, r, t: t * (s + 1), 8, np.inf
        )
        assert self.choose(policy, (7, 1)) == 1

    def test_an_old_row_goes_first_before_it_is_too_late(self) -> None:
        policy = StagePolicy("fullest", lambda stage, rows, tokens: 1.0, 8, 2.0)
        assert self.choose(policy, (7, 1), (0.0, 1.0)) == 0  # after one more run there is still time
        assert self.choose(policy, (7, 1), (0.0, 1.1)) == 1

    def test_nothing_to_choose_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="no row waits"):
            StagePolicy("fullest", lambda stage, rows, tokens: 1.0, 8, 1.0).choose([StageQueue()], 0.0)

    def test_a_queue_gives_all_rows_in_the_order_they_came(self) -> None:
        queue = StageQueue()
        queue.put(np.array([], dtype=np.int64), 0, 1.0)
        queue.put(np.array([4, 2]), 5, 2.0)
        queue.put(np.array([3]), 1, 3.0)
        assert (queue.rows, queue.tokens, queue.since) == (3, 6, 2.0)
        assert queue.take().tolist() == [4, 2, 3]
        assert (queue.rows, queue.tokens) == (0, 0)

    @given(
        rule=st.sampled_from(("fullest", "least waste")),
        fixed=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
        each=st.tuples(st.floats(0, 1), st.floats(0, 1)),
        rows=st.integers(1, 40),
        leaving=st.lists(st.floats(0, 1), min_size=1, max_size=60),
    )
    def test_no_row_waits_longer_than_the_bound(
        self,
        rule: str,
        fixed: tuple[float, float],
        each: tuple[float, float],
        rows: int,
        leaving: list[float],
    ) -> None:
        """Whoever decides who leaves: the bound is that of both stages at full batch."""

        def cost(stage: int, count: float, tokens: float) -> float:
            return fixed[stage] + each[stage] * count

        bound = cost(0, rows, rows) + cost(1, rows, rows)
        policy = StagePolicy("fullest" if rule == "fullest" else "least waste", cost, rows, bound)
        queues, now = [StageQueue(), StageQueue()], 0.0
        queues[0].put(np.arange(rows), rows, now)
        for share in leaving:
            stage = policy.choose(queues, now)
            assert now - queues[stage].since <= bound * (1 + 1e-9)
            taken = queues[stage].take()
            now += cost(stage, len(taken), len(taken))
            leave = len(taken) if stage else round(share * len(taken))
            queues[0].put(taken[:leave], leave, now)
            queues[1].put(taken[leave:], len(taken) - leave, now)


class TestSimulation:
    @pytest.mark.parametrize("sequences", [1, 64, 1000])
    @pytest.mark.parametrize("policy", POLICIES)
    def test_without_exits_the_gates_are_what_is_lost(self, policy: Policy, sequences: int) -> None:
        costs = costs_of("int4", 1024)
        outcome = simulate(Scenario(costs, sequences, "propagate", policy, exit_rate=0.0))
        off = costs.full(sequences)
        gates = costs.shallow(sequences, sequences, SCREENED * sequences) - costs.shallow(sequences, 0, 0)
        assert 0.9 < outcome.ratio < 1.0
        assert outcome.ratio == pytest.approx(off / (off + gates), rel=0.02)

    def test_waiting_for_all_gains_with_one_stream_and_nothing_in_a_crowd(self) -> None:
        costs = costs_of("int4", 1024)
        assert simulate(Scenario(costs, 1, "propagate", "wait for all", 0.6)).ratio > 1.3
        for sequences in (64, 1000):
            crowd = simulate(Scenario(costs, sequences, "propagate", "wait for all", 0.6))
            assert crowd.ratio < 1.0
            assert crowd.ratio < simulate(Scenario(costs, sequences, "propagate", "run through", 0.6)).ratio

    @pytest.mark.parametrize(
        ("depth", "acceptance", "drafts"), [(8, 0.45, 1), (8, 0.6, 2), (16, 0.5, 3), (4, 0.9, 4)]
    )
    @pytest.mark.parametrize("policy", ["run through", "least waste"])
    def test_one_verified_stream_that_reads_weights_follows_the_closed_form(
        self, policy: Policy, depth: int, acceptance: float, drafts: int
    ) -> None:
        """(1 − a^(k+1)) / (1 − a) tokens for (k+1)·f + (1−f) passes."""
        costs, share = bare_costs(depth, bandwidth=1e12), depth / 32
        scenario = Scenario(costs, 1, "verified", policy, 1.0, acceptance, drafts, tokens=5000)
        expected = (1 - acceptance ** (drafts + 1)) / (1 - acceptance) / ((drafts + 1) * share + 1 - share)
        assert simulate(scenario).ratio == pytest.approx(expected, rel=0.04)

    @pytest.mark.parametrize("policy", POLICIES[1:])
    def test_where_arithmetic_is_all_skipped_blocks_are_gained_whole(self, policy: Policy) -> None:
        scenario = Scenario(bare_costs(8, peak=1e15), 500, "propagate", policy, 0.6)
        assert simulate(scenario).ratio == pytest.approx(1 / (0.25 + 0.4 * 0.75), rel=0.02)

    def test_where_reading_is_all_only_queues_gain_and_only_if_more_leave_than_the_exit_is_deep(self) -> None:
        def ratio(policy: Policy, depth: int) -> float:
            return simulate(Scenario(bare_costs(depth, bandwidth=1e12), 500, "propagate", policy, 0.6)).ratio

        assert ratio("run through", 8) == pytest.approx(1.0)
        assert ratio("fullest", 8) == pytest.approx(1.6 / 1.25, rel=0.02)  # two shallow runs for a deep one
        assert ratio("least waste", 8) > 1.02 * ratio("fullest", 8)  # three
        assert ratio("least waste", 24) == pytest.approx(1.0, rel=0.02)
        assert ratio("fullest", 24) < 0.95

    def test_where_waiting_gains_nothing_nobody_waits_longer_for_a_token_than_with_exits_off(self) -> None:
        for policy in POLICIES[1:]:
            outcome = simulate(Scenario(costs_of("int4", 1024), 1000, "propagate", policy, 0.6))
            assert outcome.gap_p99_s < outcome.off_gap_s

    def test_run_through_takes_every_draft_deep_alone(self) -> None:
        """Sequences draft at different times: weights of the deep stage are read in every step, for a few."""
        costs = costs_of("int4", 1024, 0.25)
        alone, gathered = (
            simulate(Scenario(costs, 8, "verified", policy, 1.0, 0.7, 2))
            for policy in ("run through", "least waste")
        )
        assert alone.ratio < 0.8
        assert gathered.ratio > 1.3
        assert alone.deep_rows < 0.5 * gathered.deep_rows

    def test_backfill_pays_arithmetic_for_what_it_skipped(self) -> None:
        """Where arithmetic is all, nothing is saved: every token passes every block in the end."""
        scenario = Scenario(bare_costs(8, peak=1e15), 500, "backfill", "run through", 0.6)
        assert simulate(scenario).ratio == pytest.approx(1.0, rel=0.02)

    @pytest.mark.parametrize("mode", ["propagate", "backfill", "verified"])
    @pytest.mark.parametrize("policy", QUEUES)
    def test_nothing_waits_longer_than_the_bound(self, policy: Policy, mode: Mode) -> None:
        costs = costs_of("int4", 1024, 0.25)
        scenario = Scenario(costs, 256, mode, policy, exit_rate=0.95, acceptance=0.7, max_wait=1.0)
        gates = costs.shallow(256, 256, 256) - costs.shallow(256, 0, 0)  # as drawn, not as predicted
        bounded = simulate(scenario).longest_wait_s
        assert 0 < bounded <= scenario.max_wait_s + gates
        if mode == "propagate":  # nothing else would send them deep
            assert simulate(replace(scenario, max_wait=100.0)).longest_wait_s > scenario.max_wait_s

    def test_drafts_are_sent_together_when_they_are_confirmed(self) -> None:
        outcome = simulate(Scenario(costs_of("int4", 1024, 0.25), 1, "verified", "run through", 1.0, 1.0, 4))
        assert outcome.gap_p50_s == 0.0
        assert outcome.gap_p99_s > outcome.off_gap_s

    def test_impossible_scenarios_are_refused(self) -> None:
        costs = costs_of("bf16", 4096)
        with pytest.raises(ValueError, match="memory holds 236"):
            Scenario(costs, 237, "propagate", "fullest", 0.5)
        with pytest.raises(ValueError, match=r"exit rate 1\.5"):
            Scenario(costs, 1, "propagate", "fullest", 1.5)


class TestStudy:
    def test_the_page_shows_the_tables_of_the_results(self) -> None:
        study = _study()
        page = (ROOT / "docs" / "simulation.md").read_text()
        parts = {name: from_columns(part) for name, part in study["parts"].items()}
        shown = tables(parts, study["decision_cost"]["by_rule_and_rows"])
        assert [title for title, table in shown.items() if table not in page] == []

    def test_the_results_are_those_of_this_code(self) -> None:
        study = _study()
        for part in ("approximate", "verified", "host time"):
            points = [p for p in from_columns(study["parts"][part]) if p.resident in (64, 256)]
            for point in points[:: max(len(points) // 4, 1)]:
                assert measured(point).ratio == pytest.approx(point.ratio, rel=0.02), point

    def test_the_command_writes_results_pictures_and_tables(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(command, "measured", lambda point: replace(point, ratio=1.25))
        out, images = tmp_path / "results" / "simulation.json", tmp_path / "images"
        command.main(out, images)
        printed = capsys.readouterr().out
        assert "| INT4 | 1024 | 3,669 (memory full) | 1.25 |" in printed
        assert {p.ratio for p in from_columns(json.loads(out.read_text())["parts"]["approximate"])} == {1.25}
        assert {path.name for path in images.iterdir()} == {
            path.name for path in (ROOT / "docs" / "images").glob("simulation-*.svg")
        }

    def test_the_command_can_time_decisions_alone(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command.main(tmp_path / "out.json", tmp_path / "images", decisions=True)
        costs = json.loads(capsys.readouterr().out)
        assert {rows for rule in costs.values() for rows in rule} == {"256", "2048", "10000"}
        assert list(tmp_path.iterdir()) == []


def _study() -> dict[str, Any]:
    study: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "simulation.json").read_text())
    return study
