"""The GPU check's sections: their time, and what becomes of those that break, hang or find too little memory."""

import importlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.gpu_check.report import Context, Report
from scripts.gpu_check.table import table
from tests.scripts.toy_gpu_check import breaks, check, quick_run, toy_context


def test_a_section_gets_what_those_before_it_left_and_keeps_what_those_behind_it_need(
    tmp_path: Path,
) -> None:
    behind = ["decode", "kernels"]
    kept = sum(check.SECTIONS[name].seconds for name in behind)
    tests = check.SECTIONS["tests"]
    for seconds, wanted in (
        (kept + 400, 400),
        (kept + tests.seconds / 2, tests.seconds),  # it comes first, and may take theirs
    ):
        run = check._Run(toy_context(tmp_path, seconds), behind, tmp_path / "own", resumed=False)
        assert run._seconds(tests) == pytest.approx(wanted, abs=1)


def _run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: Sequence[str], **functions: Any) -> Report:
    """The report of sections that do what `functions` do."""
    for name, function in functions.items():
        module, attribute = check.SECTIONS[name].function.split(":")
        monkeypatch.setattr(importlib.import_module(f"scripts.gpu_check.{module}"), attribute, function)
    context = toy_context(tmp_path)
    folder = tmp_path / "own"
    folder.mkdir()
    check._Run(context, names, folder, resumed=False).all()
    return context.report


def test_a_section_that_breaks_ends_itself_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = _run(monkeypatch, tmp_path, ["machine", "memory"], machine=breaks)
    saved = json.loads(report.path.read_text())["sections"]
    assert saved["machine"]["status"] == "failed"
    assert saved["machine"]["half"] == 1
    assert saved["memory"]["status"] == "done"
    assert [one["name"] for one in report.failures] == ["section machine"]
    assert "FAILED section machine: {'error': 'RuntimeError: out of luck'}" in table(report)


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines of processes that this one would have replaced itself by."""
    said: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, line: said.append(line))
    monkeypatch.setattr(os, "set_inheritable", lambda descriptor, inheritable: None)
    return said


def test_a_device_that_no_longer_answers_is_left_to_a_fresh_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, replaced: list[list[str]]
) -> None:
    monkeypatch.setattr(check, "_device_answers", lambda device: False)
    report = _run(monkeypatch, tmp_path, ["machine", "memory"], machine=breaks)
    assert len(replaced) == 1
    assert replaced[0][replaced[0].index("--sections") + 1] == "memory"
    assert "--resume" in replaced[0]
    assert float(replaced[0][replaced[0].index("--until") + 1]) == pytest.approx(
        time.monotonic() + 100, abs=60
    )
    assert not (tmp_path / "own").exists()
    again = Report(report.path, resume=True)
    assert again.section("machine")["status"] == "failed"


def test_checks_that_a_late_break_leaves_no_time_for_fail_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, replaced: list[list[str]]
) -> None:
    monkeypatch.setattr(check, "_device_answers", lambda device: False)
    monkeypatch.setattr(check, "_LATE", 1e9)
    report = _run(monkeypatch, tmp_path, ["memory", "tests"], memory=breaks)
    assert replaced[0][replaced[0].index("--sections") + 1] == ""
    again = Report(report.path, resume=True)
    assert [one["name"] for one in again.failures] == ["section memory", "section tests"]


def test_a_section_that_hangs_is_broken_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, replaced: list[list[str]]
) -> None:
    def hangs(context: Context, found: dict[str, Any]) -> None:
        for _ in range(100):
            if replaced:
                return
            check.time.sleep(0.05)

    for grace in ("_GRACE", "_LAST_GRACE"):
        monkeypatch.setattr(check, grace, -99.0)  # of the hundred seconds that there are one is left
    _run(monkeypatch, tmp_path, ["machine"], machine=hangs)
    assert len(replaced) == 1


def test_a_process_that_goes_on_ends_when_the_one_before_it_would_have(tmp_path: Path) -> None:
    out = tmp_path / "gpu-check.json"
    out.write_text(json.dumps({"sections": {}, "checks": [], "seconds_given": 300.0}))
    said = [
        "--out",
        str(out),
        "--resume",
        "--until",
        str(time.monotonic() + 60),
        "--sections",
        "memory,exits",
    ]
    done = quick_run(*said)
    assert done.returncode == 0, done.stderr
    left = [int(line[1:].split()[0]) for line in done.stderr.splitlines() if " s left] " in line]
    assert len(left) == 2
    assert max(left) < 60  # what it took to start is gone
    assert 240 < json.loads(out.read_text())["seconds"] < 300


def test_a_section_that_finds_too_little_memory_is_left_out_with_its_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def lacks(context: Context, found: dict[str, Any]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore")

    report = _run(monkeypatch, tmp_path, ["machine", "memory"], machine=lacks)
    found = report.section("machine")
    assert found["status"] == "left out"
    assert found["skipped"] == ["machine: CUDA out of memory. Tried to allocate 9 GiB."]
    assert report.section("memory")["status"] == "done"
