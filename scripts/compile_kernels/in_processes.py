"""Compiles cases in a few processes, in which Triton's interpreter is off and whose cache is their own."""

import concurrent.futures
import multiprocessing
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

CAPABILITIES: Final = (80, 89, 90)


def compile_all(processes: int, *, tested: bool) -> list[dict[str, Any]]:
    """What each kernel takes in each case, or in those that the test suite compiles, on each kind of GPU."""
    spawned = multiprocessing.get_context("spawn")  # Triton looks at its environment when a kernel is defined
    with (
        tempfile.TemporaryDirectory(prefix="exeunt-triton-") as folder,
        concurrent.futures.ProcessPoolExecutor(processes, spawned, _prepare, (folder,)) as pool,
    ):
        shares = [(capability, number) for capability in CAPABILITIES for number in range(8)]
        tasks = [pool.submit(_compiled, *share, 8, tested) for share in shares]
        rows = [row for task in tasks for row in task.result()]
    return sorted(rows, key=key_of)


def key_of(row: Mapping[str, Any]) -> tuple[str, str, int]:
    """By what a result is found again."""
    return row["kernel"], row["case"], row["capability"]


def _prepare(folder: str) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(dir=folder)


def _compiled(capability: int, share: int, shares: int, tested: bool) -> list[dict[str, Any]]:
    from scripts.compile_kernels.cases import all_cases
    from scripts.compile_kernels.compiling import compile_launches

    wanted = [case for case in all_cases() if case.tested or not tested]
    cases = [case for case in wanted if capability in case.capabilities]
    return [
        {"case": case.name, "tested": case.tested, "capability": capability, **asdict(found)}
        for case in cases[share::shares]
        for found in compile_launches(case.call, capability, case.launch)
    ]
