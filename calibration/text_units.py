"""What counts as one draw of text: the unit of certificates.

Tokens of one document are alike, and not only neighbours. In novels the NLL increases of two stretches of 224 tokens
correlate at 0.3 to 0.4, whether they touch or have 32 or 64 tokens between them, and at 0.1 to 0.2 where these are
300 to 1,800 (`python -m scripts.compare_bounds correlation`): besides what neighbours share there is what the document
is. A gap between blocks does not undo that, so the unit is the *document*, all that a split has of it, wherever there
are documents enough. Where there are few, what is certified can only speak of text from those documents; each is then
cut into stretches, few and long, as batch means are made of a correlated series (Schmeiser, *Operations Research* 30,
1982: 10 to 30 batches; more give little).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

LEAST_DOCUMENTS: Final = 20
"""With fewer documents in a split a document is not the unit: a variance between so few says little."""
STRETCHES: Final = 30
"""Stretches that few documents are cut into, together."""
LEAST_STRETCH: Final = 256  # tokens

Unit = Literal["document", "stretch"]


@dataclass(frozen=True, slots=True)
class TextUnits:
    """Which unit each token of some rows is in: `where` [T] int64, from 0, `count` of them, and what a unit is."""

    where: NDArray[np.int64]
    count: int
    unit: Unit


def text_units(rows: Sequence[Tensor], documents: Sequence[int] | None = None) -> TextUnits:
    """The units of the tokens of `rows` (each [n]); `documents` numbers the document that each row was cut from.

    Rows of one document are taken to follow each other in it. Without `documents` every row is one.
    """
    numbers = list(range(len(rows))) if documents is None else list(documents)
    lengths = np.array([len(row) for row in rows])
    tokens_of: dict[int, int] = {}
    for number, length in zip(numbers, lengths, strict=True):
        tokens_of[number] = tokens_of.get(number, 0) + int(length)
    if len(tokens_of) >= LEAST_DOCUMENTS:
        place = {number: unit for unit, number in enumerate(tokens_of)}
        return TextUnits(
            np.repeat(np.array([place[number] for number in numbers]), lengths), len(tokens_of), "document"
        )
    wanted = max(LEAST_STRETCH, -(-int(lengths.sum()) // STRETCHES))
    stretches = {
        number: max(1, min(round(tokens / wanted), tokens // LEAST_STRETCH))
        for number, tokens in tokens_of.items()
    }
    firsts = dict(zip(stretches, np.cumsum([0, *stretches.values()]), strict=False))
    read = dict.fromkeys(tokens_of, 0)
    parts = []
    for number, length in zip(numbers, lengths, strict=True):
        position = read[number] + np.arange(length)
        parts.append(firsts[number] + position * stretches[number] // tokens_of[number])
        read[number] += int(length)
    return TextUnits(np.concatenate(parts).astype(np.int64), sum(stretches.values()), "stretch")
