"""How calibration tells a person where it stands: a protocol and a terminal form."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[int], None]
"""Called with the units of work done since the last call."""


class ProgressReport(Protocol):
    """Where calibration reports to. Phases follow one another and do not nest."""

    def phase(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """A phase of `total` units of work; the value of the `with` statement advances it."""
        ...

    def note(self, message: str) -> None:
        """A decision that was made, in one line."""
        ...


class TerminalProgress:
    """A bar with the time left for each phase, and the decisions between them, on `console`."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[Advance]:
        """A bar of `total` units that stays on the screen when the phase is over."""
        columns = (
            TextColumn("{task.description:<42}"),
            BarColumn(bar_width=24),
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
