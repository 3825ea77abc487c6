"""How SIGTERM and Ctrl-C end long work: as one exception that unwinds it, so that temporary files go."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

STOPPING: Final = (signal.SIGTERM, signal.SIGINT)
CLEANING_UP_S: Final = 3.0
"""Signals that come so soon after the first are the same wish, and would only interrupt the cleaning up."""

Handler = Callable[[int, FrameType | None], None]


class Interrupted(BaseException):
    """The process was asked to end by signal `number`; no Exception, so that nothing on the way takes it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number

    @property
    def word(self) -> str:
        """What happened, in a word."""
        return "interrupted" if self.number == signal.SIGINT else "terminated"


class Interruption:
    """A signal handler that raises Interrupted in the main thread, once for signals that come together."""

    def __init__(self) -> None:
        self._last: float | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._last is not None and now - self._last < CLEANING_UP_S:
            return
        self._last = now
        raise Interrupted(number)


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Let `handler` have SIGTERM and SIGINT; for the main thread. Those before it have them back afterwards."""
    before: dict[int, Any] = {number: signal.signal(number, handler) for number in STOPPING}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
