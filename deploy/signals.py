"""How SIGTERM and Ctrl-C end long work: as one exception that unwinds it, so that temporary files go.

An exception alone is no safe word: raised while a destructor or a weak reference's callback runs, Python drops it, and
code on the way may take it for an error of its own. So the signal is written down before it is raised, and whoever
works asks at the boundaries of that work whether there was one.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:  # the command line's help does without it
    from exeunt.calibration.progress import ProgressReport

STOPPING: Final = (signal.SIGTERM, signal.SIGINT)
CLEANING_UP_S: Final = 3.0
"""Signals that come so soon after the first are the same wish, and would only interrupt the cleaning up."""

_STANDARD_ERROR: Final = 2

Handler = Callable[[int, FrameType | None], None]


class Interrupted(BaseException):
    """The process was asked to end by signal `number`; no Exception, so that nothing on the way takes it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number
        self.kept: Path | None = None  # the folder in which unfinished work is kept, where it is

    @property
    def word(self) -> str:
        """What happened, in a word."""
        return "interrupted" if self.number == signal.SIGINT else "terminated"

    @property
    def told(self) -> str:
        """What is said of it at the end."""
        if self.kept is not None:
            return (
                f"{self.word} before it was done; the same command goes on from what is kept in {self.kept}"
            )
        return f"{self.word} before it was done; nothing was written"


class Interruption:
    """A signal handler that raises Interrupted in the main thread, once for signals that come together."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._number: int | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self._number = self._number or number  # before it is raised: that may come to nothing
        if self.cleaning_up:
            return
        self._last = time.monotonic()
        raise Interrupted(number)

    @property
    def seen(self) -> bool:
        """Whether there was a signal, also one whose exception was lost."""
        return self._number is not None

    @property
    def cleaning_up(self) -> bool:
        """Whether the last signal that was raised is so young that another one now is the same wish."""
        return self._last is not None and time.monotonic() - self._last < CLEANING_UP_S

    def check(self) -> None:
        """Raise Interrupted if there was a signal."""
        if self._number is not None:
            raise Interrupted(self._number)


class InterruptibleProgress:
    """A progress report at each of whose steps a signal takes effect whose exception was lost."""

    def __init__(self, progress: "ProgressReport", interruption: Interruption) -> None:
        self._progress, self._interruption = progress, interruption

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """The phase of the report that this one watches."""

        def checked(units: int) -> None:
            self._interruption.check()
            advance(units)

        self._interruption.check()
        with self._progress.phase(title, total) as advance:
            yield checked
            self._interruption.check()

    def note(self, message: str) -> None:
        """Pass `message` on."""
        self._interruption.check()
        self._progress.note(message)


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Let `handler` have SIGTERM and SIGINT; for the main thread. Those before it have them back afterwards.

    Where that was `end_at_once`, nobody has them: the work is done and the process about to end.
    """
    before: dict[int, Any] = {number: signal.signal(number, handler) for number in STOPPING}
    tell_unraisable = sys.unraisablehook

    def unraisable(lost: "sys.UnraisableHookArgs") -> None:
        if not isinstance(lost.exc_value, Interrupted):  # which is on record, and nobody's bug
            tell_unraisable(lost)

    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_IGN if old is end_at_once else old)
        sys.unraisablehook = tell_unraisable


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Have SIGTERM and SIGINT unwind the work under way; an error after one is taken for its doing.

    Raises:
        Interrupted: there was a signal, and the work did not end by itself.
    """
    interruption = Interruption()
    with handling(interruption):
        try:
            yield interruption
        except Exception:
            interruption.check()
            raise


def end_at_once(number: int, _frame: FrameType | None) -> None:
    """A signal handler that ends the process where it stands: for as long as nothing is under way.

    An exception would be lost in many an import; the system's own default does nothing to the first process of a
    container.
    """
    with suppress(OSError):  # nobody reads it
        os.write(_STANDARD_ERROR, f"exeunt: {Interrupted(number).word}\n".encode())
    os._exit(128 + number)


def leave_to(handler: Handler | signal.Handlers) -> None:
    """Let `handler` have SIGTERM and SIGINT from now on; for the main thread."""
    for number in STOPPING:
        signal.signal(number, handler)
