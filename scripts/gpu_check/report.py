"""What a run has found so far, as one JSON file that is written anew after every step: a kill loses nothing."""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

Found = dict[str, Any]
CHECKING: Final = ("correctness", "exit_answers", "tests")
"""Sections without which a run has shown nothing: left out for want of time they fail it."""


class Report:
    """The JSON of a run: "sections" by name, and "checks", each of which may fail the run."""

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        """`resume` goes on with the file that a run before has left, where there is one."""
        self.path = path
        self.data: Found = {"sections": {}, "checks": []}
        if resume and path.exists():
            self.data |= json.loads(path.read_text(encoding="utf-8"))

    def section(self, name: str) -> Found:
        """The results of a section, empty at first."""
        found: Found = self.data["sections"].setdefault(name, {})
        return found

    def check(self, name: str, good: bool, **detail: Any) -> None:
        """Note what a check found."""
        self.data["checks"].append({"name": name, "good": bool(good), **detail})
        self.save()

    @property
    def failures(self) -> list[Found]:
        """The checks that failed, the sections that broke off, and those that check and were left out."""
        broken = [
            {"name": f"section {name}", "error": found.get("error", found["status"])}
            for name, found in self.data["sections"].items()
            if found.get("status") in ("failed", "running")
            or (found.get("status") == "left out" and name in CHECKING)
        ]
        return [check for check in self.data["checks"] if not check["good"]] + broken

    @property
    def not_tested(self) -> list[str]:
        """What of the GPU tests did not run for want of a module, each with what it needs."""
        found = self.data["sections"].get("tests", {})
        alone = {"the GPU tests": found["needs"]} if found.get("status") == "needs" else {}
        return [f"{what} need {_installed(names)}" for what, names in alone.items()] + [
            f"{what} needs {_installed(names)}" for what, names in found.get("without", {}).items()
        ]

    @property
    def memory_rate(self) -> float | None:
        """Bytes per second of the faster of a copying and a reading kernel; None where they were not measured."""
        found = self.section("machine")
        rates = [found[key] for key in ("copy_bytes_per_s", "read_bytes_per_s") if key in found]
        return max(rates, default=None)

    def save(self) -> None:
        """Write the file: whole or not at all."""
        if self.not_tested:
            self.data["not_tested"] = self.not_tested
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.path)


def _installed(names: Sequence[str]) -> str:
    return f"{', '.join(names)} (not installed in {sys.prefix})"


class Clock:
    """How many seconds are left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @classmethod
    def until(cls, end: float) -> "Clock":
        """Of a moment that `time.monotonic` tells, the same in every process of a machine."""
        return cls(end - time.monotonic())

    def left(self) -> float:
        """Seconds left; negative once they are over."""
        return self.end - time.monotonic()


@dataclass(frozen=True, slots=True)
class Context:
    """What a section is given: where it runs, at which sizes, until when, and where its results go."""

    device: torch.device
    quick: bool
    report: Report
    clock: Clock
    bundle: Path | None = None  # of the packaged model, calibrated; None: there is none

    @property
    def cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.device.type == "cuda"

    def within(self, seconds: float) -> "Context":
        """The same with at most so many seconds."""
        return replace(self, clock=Clock(min(seconds, self.clock.left())))

    def share(self, seconds: float, kept: float) -> float:
        """What a part may take that has `seconds` for certain: more where `kept` are left for those behind it."""
        return max(seconds, self.clock.left() - kept)

    def fits(self, seconds: float, what: str, found: Found) -> bool:
        """Whether so many seconds are left; where not, `found` says what was left out."""
        if self.clock.left() >= seconds:
            return True
        found.setdefault("skipped", []).append(f"{what}: no time left")
        return False
