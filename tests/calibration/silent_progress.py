"""A progress report that nobody reads."""

from collections.abc import Iterator
from contextlib import contextmanager

from exeunt.calibration.progress import Advance


class SilentProgress:
    """Reports nothing."""

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[Advance]:
        """A phase that nobody sees."""
        yield lambda _units: None

    def note(self, message: str) -> None:
        """Forget `message`."""
