"""Compiles the kernels ahead of their use, in a few processes beside what comes first: what `--warm` runs.

Compiling takes most of a first run's time and little of the GPU. Each process has a group of kernels of its own, so
that none is compiled twice.
"""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch

from exeunt.compression.variant import Variant, WeightFormat
from scripts.gpu_check import decode_speeds, kernel_speeds
from scripts.gpu_check.correctness import VARIANTS
from scripts.gpu_check.models import packaged_decoders
from scripts.gpu_check.paged_rows import logits_of
from scripts.gpu_check.report import Context, Found, Report

PACKAGED: Final = tuple(
    f"packaged {weights} {texts}" for weights in ("full", "int4") for texts in ("long", "short")
)
"""What the answers of the packaged model need."""
GROUPS: Final = (
    *PACKAGED,
    "steps full",
    "steps int4",
    "linears",
    "other kernels",
    "free full",
    "free int4",
    "exits packaged",
    "exits large",
)
_TEXTS: Final = {"long": (600, 40), "short": (20, 1)}
"""Tokens of a call, apart by the tiles that they take: of 64 rows, or of 32 and 16."""
_ROOT: Final = Path(__file__).resolve().parents[2]


class Warmers:
    """Processes that compile, one a group; `timeout` ends those that take too long."""

    def __init__(self, context: Context, folder: Path, groups: Sequence[str]) -> None:
        """Start them."""
        self._folder, self._began = folder, time.monotonic()
        seconds = max(10, min(90, int(context.clock.left() / 2)))
        self._running = {group: self._start(context, group, seconds) for group in groups}

    def wait(self, groups: Sequence[str] | None, report: Report) -> None:
        """Wait for some groups, or for all, and note under "compiling" what they say; nothing the second time."""
        for group in tuple(self._running) if groups is None else groups:
            process = self._running.pop(group, None)
            if process is not None:
                status = process.wait()
                took = round(time.monotonic() - self._began, 1)
                said: Found = {"status": status, "seconds": took, "says": _last_line(self._log(group))}
                report.data.setdefault("compiling", {})[group] = said

    def stop(self) -> None:
        """End those that still run."""
        for process in self._running.values():
            process.terminate()  # `timeout` passes it on
        for process in self._running.values():
            process.wait()
        self._running.clear()

    def _start(self, context: Context, group: str, seconds: int) -> "subprocess.Popen[bytes]":
        said = [sys.executable, "-m", "scripts.gpu_check", "--device", str(context.device)]
        said += ["--warm", group, "--seconds", str(seconds - 5), *(["--quick"] if context.quick else [])]
        said += ["--bundle", str(context.bundle)] if context.bundle else []
        paths = [str(_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        around = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
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
