"""What callers are told of new tokens, kept back until the device works: telling takes as long as a small step does."""

from collections.abc import Callable


class Outbox:
    """Things to be said, in order. What says them raises nothing and changes nothing that a running tick reads."""

    def __init__(self, *, keeps_back: bool) -> None:
        """Where it does not keep anything back, all is said at once: where nothing works beside the host."""
        self._keeps_back = keeps_back
        self._owed: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._owed)

    def add(self, say: Callable[[], None], *, at_once: bool = False) -> None:
        """Have it said by the next `flush`, or `at_once`."""
        if self._keeps_back and not at_once:
            self._owed.append(say)
        else:
            say()

    def flush(self) -> None:
        """Say all that is owed."""
        if self._owed:
            owed, self._owed = self._owed, []
            for say in owed:
                say()
