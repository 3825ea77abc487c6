"""The GPU tests in processes of their own, in whatever time the run has left for them."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from scripts.gpu_check.bounds import bound
from scripts.gpu_check.needs import METRICS, missing
from scripts.gpu_check.report import Context, Found

TESTS: Final[dict[str, tuple[str, ...]]] = {
    "tests/compression/gpu": (),
    "tests/server/test_gpu_engine.py": METRICS,
    "tests/server/test_gate_timer.py": (),
    "tests/server/test_sampling_on_gpu.py": (),
    "tests/kernels/triton": (),
    "tests/kernels/test_gpu.py": (),
    "tests/server/test_sampling.py": ("hypothesis", "scipy"),
}
"""The tests, and the modules that they take beside pytest and those of a bare machine."""
RECORD: Final = "EXEUNT_TEST_RECORD"
CUT_SHORT: Final = 124  # what `timeout` says of tests that took too long: those that ran still count
_QUICK: Final[dict[str, tuple[str, ...]]] = {"tests/kernels/test_rows.py": ()}
_ROOT: Final = Path(__file__).resolve().parents[2]
_PROCESSES: Final = 16
_HOST_BYTES: Final = 2e9  # of one process: imports, a CUDA context, and what its tests build
_GPU_BYTES: Final = 2e9
_FIRST_LINES: Final = 25  # failures told in full


def run(context: Context, found: Found) -> None:
    """Run the tests; a check holds where some passed and none failed."""
    records, log = (context.report.path.with_suffix(f".tests.{kind}") for kind in ("jsonl", "log"))
    records.unlink(missing_ok=True)
    seconds = max(10, int(context.clock.left()) - 2)
    tests = _QUICK if context.quick else TESTS
    if lacking := {name: lack for name, needs in tests.items() if (lack := missing(needs))}:
        found["without"] = lacking
    workers = bound(context, _PROCESSES, _HOST_BYTES, _GPU_BYTES)
    found["workers"] = workers.as_dict()
    folder = tempfile.TemporaryDirectory(prefix="gpu-check-tests-", ignore_cleanup_errors=True)
    said = _pytest(context, [*tests.keys() - lacking.keys()], workers.at_once)
    try:
        with folder, log.open("wb") as stream:
            found["exit_status"] = subprocess.run(
                ["timeout", "-k", "3", str(seconds), *said],
                cwd=_ROOT,
                env=_around(records, folder.name),
                stdout=stream,
                stderr=stream,
                check=False,
            ).returncode
        found |= outcomes(records)
        found["cut_short"] = found["exit_status"] == CUT_SHORT
        ended = log.read_text(encoding="utf-8", errors="replace")
        found["log_end"] = ended[-1500:].splitlines()[-12:]
    finally:
        records.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
    good = found["failed"] == 0 and found["passed"] > 0 and found["exit_status"] in (0, CUT_SHORT)
    counts = {name: found[name] for name in ("passed", "failed", "skipped")}
    context.report.check("tests on the device", good, **counts)


def _around(records: Path, folder: str) -> dict[str, str]:
    paths = [str(_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    path = os.pathsep.join(dict.fromkeys(paths))
    return {**os.environ, RECORD: str(records), "PYTHONPATH": path, "TMPDIR": folder}


def _pytest(context: Context, tests: Sequence[str], workers: int) -> list[str]:
    said = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider"]
    # what a machine's own plug-ins and versions warn of is no failure of ours, nor a setting of one that it has not
    said += ["-W", "default", "-o", "addopts=--import-mode=importlib", "-p", "no:benchmark"]
    said += ["-p", "scripts.gpu_check.recorded_tests"]
    if not context.quick and not missing(["xdist"]):
        said += ["-n", str(workers)]
    return [*said, *sorted(tests)]


def outcomes(records: Path) -> Found:
    """Counts by outcome, and of each failure its first line."""
    lines = records.read_text(encoding="utf-8").splitlines() if records.exists() else []
    tests: list[dict[str, Any]] = [json.loads(line) for line in lines]
    failed = [test for test in tests if test["outcome"] == "failed"]
    slowest = sorted(tests, key=lambda test: -test["seconds"])[:5]
    return {
        **{name: sum(test["outcome"] == name for test in tests) for name in ("passed", "failed", "skipped")},
        "failures": [[test["test"], test["says"]] for test in failed][:_FIRST_LINES],
        "skips": sorted({test["says"] for test in tests if test["outcome"] == "skipped"})[:5],
        "slowest": [[test["test"], test["seconds"]] for test in slowest],
    }
