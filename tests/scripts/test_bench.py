"""`make bench` on a random model: what it measures and writes. No speed is asserted."""

import json
from pathlib import Path

import pytest

from scripts import bench, bench_parts
from tests.deploy.server_process import byte_bundle


def test_it_measures_pairs_and_says_what_left_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = byte_bundle(tmp_path)
    monkeypatch.setattr(bench, "packaged_bundle", lambda: bundle)
    monkeypatch.setattr(bench, "checkpoint", lambda: tmp_path / "checkpoint")
    bench.main(tmp_path / "out.json", prompt_tokens=8, new_tokens=6, repeats=1, streams=2)
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["machine"]["torch"]
    assert record["settings"]["streams"] == 2
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


def test_it_measures_the_parts_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = byte_bundle(tmp_path)
    monkeypatch.setattr(bench_parts, "packaged_bundle", lambda: bundle)
    monkeypatch.setattr(bench_parts, "ROUNDS", 1)
    bench_parts.main(tmp_path / "parts.json", prompt_tokens=8, new_tokens=6, repeats=1, streams=2)
    record = json.loads((tmp_path / "parts.json").read_text())
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
