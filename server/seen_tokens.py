"""The tokens of a text that grows, each once, as the repetition penalty reads them at every step."""

from collections.abc import Sequence

import numpy as np


class SeenTokens:
    """Which tokens a text holds. Asking again costs as much as the text has grown, not as long as it is."""

    __slots__ = ("_count", "_ids", "_known", "_read")

    def __init__(self) -> None:
        self._ids = np.empty(64, np.int32)
        self._count = 0
        self._known: set[int] = set()
        self._read = 0  # tokens of the text

    def up_to(self, tokens: Sequence[int], end: int, confirmed: int) -> np.ndarray:
        """The ids among the first `end` of `tokens`, int32, in any order; those behind `confirmed` may stand twice.

        Of one call to the next the first `confirmed` tokens may only be added to; what follows them, drafts, may be
        others.
        """
        if (
            end < self._read
        ):  # asked of less than before: not what steps do, so it may take as long as it takes
            return np.array(tokens[:end], np.int32)
        for token in tokens[self._read : min(end, confirmed)]:
            if token not in self._known:
                self._known.add(token)
                self._append(token)
        self._read = min(end, confirmed)
        own, drafts = self._ids[: self._count], tokens[self._read : end]
        return np.concatenate((own, np.array(drafts, np.int32))) if drafts else own

    def _append(self, token: int) -> None:
        if self._count == len(self._ids):  # ids that were given out stay in the array that they are of
            self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
        self._ids[self._count] = token
        self._count += 1
