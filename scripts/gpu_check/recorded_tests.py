"""A pytest plug-in that writes each test's outcome as a line of JSON as soon as it is known: a kill loses none."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

_RECORD = "EXEUNT_TEST_RECORD"


class _Recorder:
    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test's own outcome, or that of a set-up or tear-down that went wrong or was skipped."""
        if report.when == "call" or report.outcome != "passed":
            self._write(report.nodeid, report.outcome, report.duration, report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that could not be read."""
        if report.outcome == "failed":
            self._write(report.nodeid, report.outcome, 0.0, report)

    def _write(self, test: str, outcome: str, seconds: float, report: Any) -> None:
        line = {"test": test, "outcome": outcome, "seconds": round(seconds, 2), "says": _first_line(report)}
        with self._path.open("a", encoding="utf-8") as records:
            records.write(json.dumps(line) + "\n")


def _first_line(report: Any) -> str:
    """Why a test did not pass."""
    told = report.longrepr
    crash = getattr(told, "reprcrash", None)
    if crash is not None:
        return " ".join(str(crash.message).split())[:300]
    if isinstance(told, tuple):  # of a skip: file, line, reason
        return str(told[2])[:200]
    lines = str(told or "").strip().splitlines()
    return lines[-1][:300] if lines else ""


def pytest_configure(config: pytest.Config) -> None:
    """Record in the process that gathers all reports, not in the workers of pytest-xdist."""
    path = os.environ.get(_RECORD)
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(Path(path)))
