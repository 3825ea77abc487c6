"""The GPU check on a CPU at toy sizes, and what it makes of kernels, sections and devices that fail."""

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu_check import (
    bounds,
    end_to_end,
    grid,
    kernel_speeds,
    kernel_tests,
    machine,
    warming,
)
from scripts.gpu_check.report import CHECKING, Report
from scripts.gpu_check.synthetic_exit import WANTED
from scripts.gpu_check.table import table
from scripts.gpu_page import contents
from tests.scripts.toy_gpu_check import ROOT, check, quick_run, toy_context


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu-check.json"
    done = quick_run("--out", str(out), "--seconds", "250", "--sections", ",".join(check.SECTIONS))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert {name: each["status"] for name, each in found["sections"].items()} == dict.fromkeys(
        check.SECTIONS, "done"
    )
    assert found["sections"]["machine"]["torch"] == importlib.metadata.version("torch")
    assert found["sections"]["machine"]["copy_bytes_per_s"] > 0
    assert len(found["sections"]["machine"]["kernels"]) == len(found["sections"]["machine"]["linear_kernels"])
    assert found["sections"]["machine"]["read_bytes_per_s"] > 0
    assert found["sections"]["tests"]["passed"] > 0
    cases = found["sections"]["kernels"]["cases"]
    assert {case["op"] for case in cases} == {
        *("int4_linear", "paged_attention", "write_kv", "draw_tokens", "rms_norm", "turn_and_write_kv"),
        *("exit_gate", "penalise_scores", "truncate_scores"),
    }
    assert all(case["us"] > 0 for case in cases)
    assert all(step["ms"] > 0 for step in found["sections"]["decode"]["steps"])
    ends = found["sections"]["end_to_end"]
    for streams in (1, 2):
        speeds = {mode: ends["toy"][f"engine {mode}, {streams} streams"] for mode in end_to_end.RANDOM_MODES}
        off = [
            mode for mode in speeds if "exits" not in mode and "verified" not in mode
        ]  # whose drafts may be right
        assert {speeds[mode]["exit_rate"] for mode in off} == {0.0}
        left = [streams * 4 * speeds[mode]["exit_rate"] for mode in speeds]  # of answers of four tokens
        assert left == pytest.approx([round(each) for each in left])
        assert all(each["kv_bytes_per_sequence"] == each["kv_bytes_by_layout"] for each in speeds.values())
    assert ends["toy"]["wanted_exit_rate"] == WANTED
    assert ends["toy"]["wanted_exit_rate"] == 0.5
    modes = {name.split(", ")[0] for name in ends["toy again"] if ", " in name}
    assert modes == {f"engine {name}" for name in end_to_end.RANDOM_MODES}
    assert ends["packaged"]["engine full/full, 2 streams"]["captured_while_timed"] == 0
    assert ends["packaged"]["gates"] == "no bundle: no exits"
    assert "engine int4/int4 linear block (synthetic), 2 streams" in ends["packaged"]
    theirs = ends["packaged"]["transformers generate, 1 streams"]
    assert len(theirs["all_seconds"]) == 3
    assert theirs["seconds"] == min(theirs["all_seconds"])
    assert theirs["forward_loop"]["tokens_per_s"] > 0
    contexts = found["sections"]["long_contexts"]
    for tokens, streams in ((40, 2), (90, 1)):
        speeds = contexts[f"toy, contexts of {tokens}"]
        assert speeds["gates"].startswith("synthetic")
        assert speeds[f"transformers generate, {streams} streams"]["tokens_per_s"] > 0
        assert speeds[f"engine full/full, {streams} streams"]["tokens_per_s"] > 0
    for streams, tokens in grid.TOY_CELLS:
        speeds = found["sections"]["grid"][f"toy, contexts of {tokens}"]
        names = [*(f"engine {mode}" for mode in grid.MODES), "transformers generate static"]
        assert all(speeds[f"{name}, {streams} streams"]["tokens_per_s"] > 0 for name in names)
    host = found["sections"]["host"]["off, 2 streams"]
    assert host["us"] > 0
    longest = [*host["functions"].values()]
    assert longest == sorted(longest, reverse=True)
    assert longest[0] > 0
    assert "server.runner: Runner.run" in host["functions"]
    assert found["sections"]["compiled"]["skipped"]
    checked = [one["name"] for one in found["checks"]]
    assert len(checked) > 40
    assert "engine int4/int4 in graphs: backfilled, 3 streams, as without graphs" in checked
    assert "bfloat16 int4/full passes of every size to the bit, of rows" in checked
    assert all(one["good"] for one in found["checks"])
    assert "checks: " in done.stdout
    lacking = {what for what, text in contents("gpu-check-cpu", found).items() if not text}
    assert lacking == {"parts", "tuning"}  # those of the large model, and what takes a GPU


def test_what_no_longer_fits_is_left_out_and_said_so(tmp_path: Path) -> None:
    context = toy_context(tmp_path, 4.5)
    check._Run(context, ["machine", "kernels", "decode", "compiled"], tmp_path / "own", resumed=False).all()
    found = json.loads(context.report.path.read_text())["sections"]
    assert found["machine"]["status"] == "done"
    left = context.report.data["sections"]
    assert {left[name]["status"] for name in ("kernels", "decode", "compiled")} == {"left out"}
    assert left["kernels"]["skipped"] == ["kernels: no time left"]


@pytest.mark.parametrize("name", ["correctness", "tests"])
def test_a_run_without_time_for_its_checks_fails(tmp_path: Path, name: str) -> None:
    out = tmp_path / "gpu-check.json"
    done = quick_run("--out", str(out), "--seconds", "4", "--sections", f"memory,{name}")
    assert done.returncode == 1, done.stderr
    assert json.loads(out.read_text())["sections"][name]["status"] == "left out"
    assert f"FAILED section {name}: {{'error': 'left out'}}" in done.stdout


def test_the_sections_that_run_by_themselves_have_room_in_eight_minutes() -> None:
    kept = {name: section.seconds for name, section in check.SECTIONS.items() if not section.extra}
    assert tuple(kept) == check.DEFAULT
    assert check.SECONDS == check.COMPILING + sum(kept.values()) <= 460
    assert check.SECONDS + check._LAST_GRACE < check.SECONDS + check._END < 8 * 60
    assert kept["compiled"] >= 75
    checking = [name for name in check.SECTIONS if name in CHECKING]
    assert list(check.SECTIONS)[: 2 + len(CHECKING)] == ["machine", "memory", *checking]
    assert checking == [*CHECKING]


def test_a_section_that_nobody_knows_is_refused() -> None:
    done = quick_run("--sections", "machine,speed")
    assert done.returncode == 2
    assert "there is no section speed" in done.stderr


@pytest.mark.parametrize("seconds", ["0.5", "nan", "long"])
def test_seconds_that_are_none_are_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        check.main(["--device", "cpu", "--seconds", seconds])
    assert f"argument --seconds: {seconds} is not a number of at least 1" in capsys.readouterr().err


def test_tests_are_recorded_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.skip(reason='no wind')\n"
        "def test_idle(): pass\n"
    )
    records = tmp_path / "records.jsonl"
    around = {**os.environ, kernel_tests.RECORD: str(records), "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "pytest", "-q", "-p", "scripts.gpu_check.recorded_tests", str(tmp_path)]
    subprocess.run(line, cwd=tmp_path, env=around, capture_output=True, timeout=120, check=False)
    found = kernel_tests.outcomes(records)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert found["failures"][0][0].endswith("test_bad")
    assert "one is not two" in found["failures"][0][1]
    assert found["skips"] == ["Skipped: no wind"]


@pytest.mark.parametrize(("line", "good"), [("", False), ("passed", True), ("failed", False)])
def test_no_tests_are_no_success_and_a_failure_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, good: bool
) -> None:
    record = json.dumps({"test": "test_it", "outcome": line, "seconds": 1, "says": "why"}) if line else ""
    stands = f"import os, sys; print({record!r}, file=open(os.environ['{kernel_tests.RECORD}'], 'w')"
    stands += ") if sys.argv[1:] == ['x'] else 0"
    said = [sys.executable, "-c", stands, "x" if line else "y"]
    monkeypatch.setattr(kernel_tests, "_pytest", lambda context, tests, workers: said)
    context, found = toy_context(tmp_path), dict[str, Any]()
    kernel_tests.run(context, found)
    (made,) = context.report.data["checks"]
    assert made["good"] == good
    assert found["exit_status"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json"]


def test_kernels_are_compiled_in_processes_that_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quick = toy_context(tmp_path, 400)  # cores may be busy
    warmers = warming.Warmers(quick, tmp_path, ["packaged int4 short", "linears"])
    try:
        warmers.wait(["packaged int4 short"], quick.report)
        said = quick.report.data["compiling"]["packaged int4 short"]
        assert said["status"] == 0
        assert said["says"].startswith("2 jobs, 0 failed []")
        assert said["seconds"] > 0
        warmers.wait(["packaged int4 short"], quick.report)
    finally:
        warmers.stop()
    warmers.wait(None, quick.report)
    assert list(quick.report.data["compiling"]) == ["packaged int4 short"]


def test_processes_that_compile_run_as_many_at_once_as_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    running: list[str] = []
    most: list[int] = []

    class Process:
        def __init__(self, group: str) -> None:
            self.group = group
            running.append(group)
            most.append(len(running))

        def wait(self) -> int:
            time.sleep(0.05)
            running.remove(self.group)
            return 0

    monkeypatch.setattr(bounds, "usable_cores", lambda: 2)
    monkeypatch.setattr(warming.Warmers, "_start", lambda self, group, seconds: Process(group))
    monkeypatch.setattr(warming, "_last_line", lambda log: "done")
    context = toy_context(tmp_path)
    warmers = warming.Warmers(context, tmp_path, warming.GROUPS)
    warmers.wait(None, context.report)
    assert max(most) == 2
    assert [*context.report.data["compiling"]] == [*warming.GROUPS]
    assert context.report.data["compiling_bound"]["at_once"] == 2
    monkeypatch.setattr(warming, "_MOST_SECONDS", -1.0)
    monkeypatch.setattr(warming, "_LEAST_SECONDS", 11)
    late = warming.Warmers(context, tmp_path, ["linears"])
    late.wait(None, context.report)
    assert context.report.data["compiling"]["linears"]["says"] == "not begun, no time left"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("group", warming.GROUPS)
def test_every_group_of_kernels_has_jobs_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, group: str
) -> None:
    monkeypatch.setattr(kernel_speeds, "triton_runs", lambda device: True)
    jobs = list(warming._jobs(toy_context(tmp_path), group))
    assert len(jobs) >= (1 if group.startswith(("steps", "exits")) else 2)


def test_the_machine_says_which_kernels_were_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    assert machine._git("rev-parse", "HEAD") == (here.stdout.strip() or None)
    assert machine._git("no-such-command") is None
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    assert machine._git("rev-parse", "HEAD") is None
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "notes.md").write_text("1")
    first = machine.sources_digest(tmp_path)
    (tmp_path / "notes.md").write_text("2")
    assert machine.sources_digest(tmp_path) == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert machine.sources_digest(tmp_path) != first


def test_shares_are_of_the_faster_rate(tmp_path: Path) -> None:
    report = Report(tmp_path / "out.json")
    assert report.memory_rate is None
    report.section("machine").update(copy_bytes_per_s=2.0, read_bytes_per_s=3.0)
    assert report.memory_rate == 3.0


def test_the_table_is_short_whatever_there_is(tmp_path: Path) -> None:
    report = Report(tmp_path / "out.json")
    for number in range(300):
        report.check(f"check {number}", number % 2 == 0, why="x" * 500)
    report.section("decode")["steps"] = [
        {
            "model": "toy",
            "sequences": 1,
            "context": each,
            "weights": "full",
            "kv": "full",
            "ms": 1.0,
            "method": "clock",
        }
        for each in range(18)
    ]
    report.section("end_to_end")["toy"] = {f"{each:0>130}": {"tokens_per_s": 1.0} for each in range(60)}
    report.section("tests").update(status="needs", needs=["pytest"])
    lines = table(report).splitlines()
    assert len(lines) == 60
    assert max(map(len, lines)) <= 150
    assert lines[-2].endswith("more lines; all is in the JSON")
    assert lines[-1].startswith("NOT TESTED: the GPU tests need pytest (")
    assert report.failures[-1]["name"] == "check 299"  # what is not tested fails nothing
