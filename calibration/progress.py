"""How calibration tells a person where it stands: a protocol, a form for terminals and one for files and logs."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EVERY_S: Final = 10.0
"""Seconds between the lines that tell of a phase where no terminal shows a bar."""

Advance = Callable[[int], None]
"""Called with the units of work done since the last call."""


_TITLE: Final = 46
_BESIDE: Final = 29  # the columns beside title and bar, with the blanks between


class ProgressReport(Protocol):
    """Where calibration reports to. Phases follow one another and do not nest."""

    def phase(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """A phase of `total` units of work; the value of the `with` statement advances it."""
        ...

    def note(self, message: str) -> None:
        """A decision that was made, in one line."""
        ...


class NumberedProgress:
    """A report whose phases are numbered, for work whose number of phases is known before."""

    def __init__(self, progress: ProgressReport, phases: int) -> None:
        self._progress, self._phases, self._begun = progress, phases, 0

    def phase(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """The next phase: "step 2 of 9: " and its title."""
        self._begun += 1
        return self._progress.phase(f"step {self._begun} of {self._phases}: {title}", total)

    def note(self, message: str) -> None:
        """Pass `message` on."""
        self._progress.note(message)


class TerminalProgress:
    """A bar with the time left for each phase, and the decisions between them, on `console`."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[Advance]:
        """A bar of `total` units that stays on the screen when the phase is over."""
        columns = (
            TextColumn(f"{{task.description:<{_TITLE}}}"),
            BarColumn(bar_width=max(4, min(24, self._console.width - _TITLE - _BESIDE))),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as bars:
            task = bars.add_task(title, total=max(1, total))
            yield lambda units: bars.advance(task, units)
            bars.update(task, completed=max(1, total))

    def note(self, message: str) -> None:
        """Print `message`."""
        self._console.print(message, style="dim", highlight=False)


class LineProgress:
    """Lines for a file or a log, where a bar would be noise: `write` is given each, whole and without its end."""

    def __init__(self, write: Callable[[str], None] | None = None, every_s: float = EVERY_S) -> None:
        self._write = write or _to_standard_error
        self._every_s = every_s

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[Advance]:
        """A line every few seconds with the share done and the time left, and one at the end."""
        began = told = time.monotonic()
        done = 0

        def advance(units: int) -> None:
            nonlocal done, told
            done += units
            now = time.monotonic()
            if now - told < self._every_s or not done:
                return
            told = now
            left = (now - began) * max(0, total - done) / done
            self._write(f"{title}: {100 * min(1, done / total):.0f} %, about {left:.0f} s left.")

        yield advance
        self._write(f"{title}: done in {time.monotonic() - began:.1f} s.")

    def note(self, message: str) -> None:
        """Write `message`."""
        self._write(message)


def _to_standard_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def watched_progress() -> ProgressReport:
    """Bars where standard error is a terminal, lines where it is a file or a pipe."""
    return TerminalProgress() if sys.stderr.isatty() else LineProgress()
