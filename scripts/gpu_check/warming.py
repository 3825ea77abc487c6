"""Compiles the kernels ahead of their use, in a few processes beside what comes first: what `--warm` runs.

Compiling takes most of a first run's time and little of the GPU. Each process has a group of kernels of its own, so
that none is compiled twice; as many run at once as the machine has room for, the others in their turn.
"""

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

import torch

from exeunt.compression.variant import Variant, WeightFormat
from scripts.gpu_check import decode_speeds, kernel_speeds
from scripts.gpu_check.bounds import bound
from scripts.gpu_check.correctness import VARIANTS
from scripts.gpu_check.models import packaged_decoders
from scripts.gpu_check.paged_rows import logits_of
from scripts.gpu_check.report import Context, Found, Report

PACKAGED: Final = tuple(
    f"packaged {weights} {texts}" for weights in ("full", "int4") for texts in ("long", "short")
)
"""What the answers of the packaged model need."""
EXITS: Final = "exits packaged"
"""What its answers with exits need beside."""
GROUPS: Final = (
    *PACKAGED,
    EXITS,
    "steps full",
    "steps int4",
    "linears",
    "other kernels",
    "free full",
    "free int4",
    "exits large",
)
_TEXTS: Final = {"long": (600, 40), "short": (20, 1)}
"""Tokens of a call, apart by the tiles that they take: of 64 rows, or of 32 and 16."""
_ROOT: Final = Path(__file__).resolve().parents[2]
_HOST_BYTES: Final = 1.5e9  # of one process: 0.6 GB of imports, a CUDA context and its compiler
_GPU_BYTES: Final = 3e9  # of one process: a CUDA context and the largest buffers of a group
_MOST_SECONDS: Final = 90.0
_LEAST_SECONDS: Final = 10  # left without which none is begun: starting takes them


class Warmers:
    """Processes that compile, one a group, at most so many at once; `timeout` ends those that take too long."""

    def __init__(self, context: Context, folder: Path, groups: Sequence[str]) -> None:
        """Start the first of them. The last must end with the time that all of them have."""
        self._context, self._folder, self._began = context, folder, time.monotonic()
        self._seconds = max(10.0, min(_MOST_SECONDS, context.clock.left() / 2))
        self._lock, self._stopped = threading.Lock(), False
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._said: dict[str, Future[Found]] = {}
        if not groups:
            return
        room = bound(context, len(groups), _HOST_BYTES, _GPU_BYTES)
        context.report.data["compiling_bound"] = room.as_dict()
        self._threads = ThreadPoolExecutor(room.at_once, "warming")
        self._said = {group: self._threads.submit(self._one, group) for group in groups}

    def wait(self, groups: Sequence[str] | None, report: Report) -> None:
        """Wait for some groups, or for all, and note under "compiling" what they say; nothing the second time."""
        for group in tuple(self._said) if groups is None else groups:
            said = self._said.pop(group, None)
            if said is not None:
                report.data.setdefault("compiling", {})[group] = said.result()

    def stop(self) -> None:
        """End those that still run, and begin no other."""
        with self._lock:
            self._stopped = True
            for process in self._running.values():
                process.terminate()  # `timeout` passes it on
        for said in self._said.values():
            if not said.cancel():
                said.result()
        self._said.clear()

    def _one(self, group: str) -> Found:
        """What a group's process says, once it has ended."""
        seconds = int(self._seconds - (time.monotonic() - self._began))
        with self._lock:
            if self._stopped or seconds < _LEAST_SECONDS:
                return {"status": None, "seconds": 0.0, "says": "not begun, no time left"}
            process = self._running[group] = self._start(group, seconds)
        status = process.wait()
        with self._lock:
            del self._running[group]
        took = round(time.monotonic() - self._began, 1)
        return {"status": status, "seconds": took, "says": _last_line(self._log(group))}

    def _start(self, group: str, seconds: int) -> "subprocess.Popen[bytes]":
        context = self._context
        said = [sys.executable, "-m", "scripts.gpu_check", "--device", str(context.device)]
        said += ["--warm", group, "--seconds", str(max(1, seconds - 5))]
        said += ["--quick"] if context.quick else []
        said += ["--bundle", str(context.bundle)] if context.bundle else []
        paths = [str(_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        around = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
        around["TMPDIR"] = str(self._folder)  # what one leaves that is ended goes with the folder
        with self._log(group).open("wb") as log:
            return subprocess.Popen(
                ["timeout", "-k", "3", str(seconds), *said], cwd=_ROOT, env=around, stdout=log, stderr=log
            )

    def _log(self, group: str) -> Path:
        return self._folder / f"{group.replace(' ', '-')}.log"


@torch.inference_mode()
def warm(context: Context, group: str) -> str:
    """Run every job of a group once. Says how it went."""
    errors: list[str] = []
    done = 0
    for job in _jobs(context, group):
        if context.clock.left() < 0:
            break
        try:
            job()
        except Exception as error:  # noqa: BLE001 - the timing itself will tell; the other kernels are compiled here
            errors.append(f"{type(error).__name__}: {error}"[:150])
        done += 1
        if context.cuda:
            gc.collect()
            torch.cuda.empty_cache()
    return f"{done} jobs, {len(errors)} failed {errors[:1]}"


def _jobs(context: Context, group: str) -> Iterator[Callable[[], None]]:
    kind, _, what = group.partition(" ")
    if kind == "packaged":
        weights, _, texts = what.partition(" ")
        return _packaged(context, "int4" if weights == "int4" else "full", _TEXTS[texts])
    if kind == "free":
        return kernel_speeds.free_warm_jobs(context, "int4" if what == "int4" else "full")
    if kind == "steps":
        return decode_speeds.warm_jobs(context, "int4" if what == "int4" else "full")
    if kind == "exits":
        from scripts.gpu_check.engine_warming import exit_jobs  # the engine, which no other group takes

        return exit_jobs(context, packaged=what == "packaged")
    return kernel_speeds.warm_jobs(context, linears=kind == "linears")


def _packaged(
    context: Context, weights: WeightFormat, texts: tuple[int, ...]
) -> Iterator[Callable[[], None]]:
    """The packaged model in bfloat16, in the variants of these weights, with texts of so many tokens."""
    return (partial(_read, context, each, texts) for each in VARIANTS if each.weights == weights)


def _read(context: Context, variant: Variant, texts: tuple[int, ...]) -> None:
    _, decoders = packaged_decoders(context.device, torch.bfloat16)
    for tokens in (20,) if context.quick else texts:
        logits_of(decoders[variant.weights, False], variant.kv_cache, [[1] * tokens], [tokens])


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else ""
