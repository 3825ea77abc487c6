"""`make bench` on a random model: what it measures and writes. No speed is asserted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from exeunt.compression.bundle import file_sha256
from exeunt.compression.variant import Variant
from exeunt.server.tick_run import StageRun
from scripts import bench, bench_adaptive, bench_gaps, bench_parts, bench_runs, bench_whole
from scripts.predicted import Prediction
from tests.deploy.server_process import byte_bundle


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, set[Any]]:
    """A random model in the packaged one's place; what it was asked, by the number of prompts at once."""
    bundle, seen = byte_bundle(tmp_path), dict[int, set[Any]]()
    monkeypatch.setattr(bench_runs, "packaged_bundle", lambda: bundle)
    monkeypatch.setattr(bench, "checkpoint", lambda: tmp_path / "checkpoint")
    monkeypatch.setattr(bench_parts, "ROUNDS", 1)
    at_once = bench_runs.EngineRuns.at_once

    def noting(
        runs: bench_runs.EngineRuns,
        prompts: bench_runs.Prompts,
        variant: Variant,
        early_exit: Mapping[str, Any] = bench_runs.OFF,
    ) -> bench_runs.Run:
        seen.setdefault(len(prompts), set()).add(tuple(map(tuple, prompts)))
        return at_once(runs, prompts, variant, early_exit)

    monkeypatch.setattr(bench_runs.EngineRuns, "at_once", noting)
    return seen


def assert_says_what_was_measured(record: dict[str, Any], checkpoint: Path) -> None:
    assert record["model"]["name"] == "small"
    assert record["model"]["sha256"] == file_sha256(checkpoint / "model.safetensors")
    assert record["model"]["exits"] == ["block_1"]
    assert all(record["machine"][fact] for fact in ("cpu", "exeunt", "torch"))
    assert record["settings"] == {"prompt_tokens": 8, "new_tokens": 6, "repeats": 1, "streams": 2}


def test_both_benchmarks_take_the_same_prompts(tmp_path: Path, asked: dict[int, set[Any]]) -> None:
    bench.main(tmp_path / "out.json", prompt_tokens=8, new_tokens=2, repeats=1, streams=2)
    first = {count: set(prompts) for count, prompts in asked.items()}
    asked.clear()
    bench_parts.main(tmp_path / "parts.json", prompt_tokens=8, new_tokens=2, repeats=1, streams=2)
    assert set(first) == {1, 2, 8}
    assert asked == {count: first[count] for count in (1, 2)}
    ((single,),) = first[1]
    (all_eight,) = first[8]
    assert first[2] == {all_eight[:2]}
    assert single == all_eight[0]
    assert len(set(all_eight)) == 8


@pytest.mark.usefixtures("asked")
def test_it_measures_pairs_and_says_what_left_early(tmp_path: Path) -> None:
    bench.main(tmp_path / "out.json", prompt_tokens=8, new_tokens=6, repeats=1, streams=2)
    record = json.loads((tmp_path / "out.json").read_text())
    assert_says_what_was_measured(record, tmp_path / "checkpoint")
    against_generate = [name for name in record["results"] if "generate" in name]
    assert len(against_generate) == 4
    for name in against_generate:
        assert record["results"][name]["ratio"] > 0
        assert "exit_rate" not in record["results"][name]
    exits = {name: row for name, row in record["results"].items() if "exits" in name}
    assert any("at the certified target 0.1" in name for name in exits)
    for row in exits.values():
        if row.get("exit_rate"):
            assert 0 < row["blocks_skipped_share"] < row["exit_rate"]


@pytest.mark.usefixtures("asked")
def test_it_measures_what_depth_by_token_brings(tmp_path: Path) -> None:
    bench_adaptive.main(tmp_path / "out.json", prompt_tokens=8, new_tokens=12, repeats=1)
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert {name: len(rows) for name, rows in results.items()} == {
        "verified against off": 6,
        "approximate against off": len(results["approximate against off"]),
        "queues against run-through": len(results["queues against run-through"]),
        "run-through against wait-for-all": 3,  # one variant of the random model is certified
    }
    for rows in results.values():
        for row in rows.values():
            assert (row["ratio"] == "uninformative") == (not row["informative"])
            assert row["repeats"] == 1
    rates = [
        (row["exit_rate"], row["against_exit_rate"])
        for name, row in results["run-through against wait-for-all"].items()
        if name.startswith("8 streams")
    ]
    assert all(alone > together for alone, together in rates)


@pytest.mark.usefixtures("asked")
def test_it_measures_ticks_in_one_call(tmp_path: Path) -> None:
    bench_whole.main(tmp_path / "out.json", prompt_tokens=8, new_tokens=6, repeats=1)
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(results) == 18  # one variant of the random model is certified
    for name, row in results.items():
        assert row["ratio"] > 0
        leave = name.rpartition(", ")[2].partition(" ")[0] in ("propagate", "backfill")
        assert row["exit_rate"] is None if name.endswith("verified") else (row["exit_rate"] > 0) == leave


@pytest.mark.usefixtures("asked")
def test_it_measures_gaps_beside_long_prompts(tmp_path: Path) -> None:
    bench_gaps.main(tmp_path / "out.json", prompt_tokens=24, new_tokens=12, repeats=1)
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(results) == 2
    for row in results.values():
        assert row["p99_ratio"] == pytest.approx(row["beside_s"]["p99"] / row["alone_s"]["p99"])
        assert 0 < row["alone_s"]["p50"] <= row["alone_s"]["p99"]


def test_a_prediction_adds_up_what_was_run() -> None:
    """Two tokens: one drafted and confirmed with the next, which a full pass would have been for each."""
    costs = Prediction(exit_stage=1, gate=0.1, shallow=0.6, tokens=(1, 2, 4), deep=(0.4, 0.5, 0.9))

    def run(stages: range, tokens: int, gated: int = 0) -> StageRun:
        return StageRun(Variant(), stages, 1.0, 1, tokens, gated, 0.0)

    prompt, drafted = run(range(3), 100), [run(range(2), 1, 1), run(range(2), 1), run(range(2, 3), 2)]
    assert costs.ratio([prompt, run(range(3), 1)], 1) == pytest.approx(1.0)
    assert costs.ratio([prompt, *drafted], 2) == pytest.approx(2 / (0.6 + 0.1 + 0.6 + 0.5))
    assert costs.ratio([run(range(3), 4)], 4) == pytest.approx(4 / (0.9 + 0.6 * 0.9 / 0.4))


@pytest.mark.usefixtures("asked")
def test_it_measures_the_parts_of_a_step(tmp_path: Path) -> None:
    bench_parts.main(tmp_path / "parts.json", prompt_tokens=8, new_tokens=6, repeats=1, streams=2)
    record = json.loads((tmp_path / "parts.json").read_text())
    assert_says_what_was_measured(record, tmp_path / "checkpoint")
    assert set(record["results"]) == {
        f"{count}, {label}"
        for count in ("1 stream", "2 streams")
        for label in ("full weights", "INT4 weights and KV")
    }
    for row in record["results"].values():
        assert all(value > 0 for value in row["parts"].values())
    assert any("exits_on" in row for row in record["results"].values())


@pytest.mark.parametrize(
    ("rows", "expected_on"),
    [(1, 100 + 10 + 5 - 0.25 * 40 - 0.25 * 10 + 7 + 0.25 * 4), (8, 100 + 10 + 5 - 10 - 2 + 7 + 4)],
)
def test_what_exits_save_and_cost(rows: int, expected_on: float) -> None:
    parts = {
        "all blocks": 100.0,
        "own head": 10.0,
        "draw": 5.0,
        "blocks behind the exit, all rows": 40.0,
        "blocks behind the exit, rows that stay": 30.0,
        "own head, rows that stay": 8.0,
        "gate with its projection": 7.0,
        "keys and values of rows that leave": 4.0,
    }
    steps = bench_parts.StepTimes(off=200e-6, on=220e-6, target=0.1, exit_rate=0.25, rows=rows, left=2)
    account = bench_parts._account(steps, parts)
    assert account["exits_off"] == pytest.approx({"step": 200.0, "parts": 115.0, "rest": 85.0})
    assert account["exits_on"]["parts"] == pytest.approx(expected_on)
    assert account["exits"]["paid_around"] == pytest.approx(220.0 - expected_on - 85.0)
