"""A calibration of the tiny checkpoint, for the tests of whole ones, and one that watches its progress."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exeunt.calibration.exit_screen import ScreenSize
from exeunt.calibration.exit_training import HeadTraining
from exeunt.calibration.gate_training import ProbeTraining
from exeunt.calibration.generation import GenerationSize
from exeunt.calibration.options import CalibrationOptions
from exeunt.calibration.presets import StudySizes
from exeunt.calibration.progress import Advance
from tests.calibration.silent_progress import SilentProgress


def options(checkpoint: Path, text_file: Path, out: Path) -> CalibrationOptions:
    return CalibrationOptions(
        model=str(checkpoint),
        out=out,
        data=str(text_file),
        tokens=6000,
        exits=(0, 2),
        drafting_exit=1,
        risk=(0.05, 0.3),
        device="cpu",
        row_tokens=64,
        batch_tokens=512,
        evaluation_tokens=500,
        least_tokens=3000,
        hessian_tokens=1000,
        block_tokens=500,
        screen=ScreenSize(tokens=512, trained=2),
        studies=StudySizes(weights=400, kv=400, losses=1, generation=GenerationSize(4, 8, 12)),
        costs="now",
        head=HeadTraining(visits=2000, evaluations=2),
        probe=ProbeTraining(units=8, steps=40, evaluations=2),
    )


class Watched(SilentProgress):
    """Adds up what each phase promised and what it did; `stop_in` interrupts the phase of that name.

    `steps` are the phases' numbers, each with how many there are.
    """

    def __init__(self, stop_in: str | None = None) -> None:
        self.promised: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.notes: list[str] = []
        self.steps: list[tuple[int, int]] = []
        self._stop_in = stop_in

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[Advance]:
        if numbered := re.fullmatch(r"step (\d+) of (\d+): (.+)", title):
            self.steps.append((int(numbered[1]), int(numbered[2])))
            title = numbered[3]
        self.promised[title], self.done[title] = total, 0

        def advance(units: int) -> None:
            self.done[title] += units
            if title == self._stop_in:
                raise KeyboardInterrupt

        yield advance

    def note(self, message: str) -> None:
        self.notes.append(message)
