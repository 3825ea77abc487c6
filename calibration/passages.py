"""Passages: runs of lines of about a page, cut out of one long text, or joined from documents that are hardly any.

A passage is what is dealt to a split where a document is too long for that, or too short to be one.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from statistics import median
from typing import Final

PASSAGE_CHARACTERS: Final = 2000
SHORT: Final = 400
"""Characters. Rows of a data set of which most are shorter are taken to be its lines or paragraphs, not documents."""
_LONG_LINE: Final = 4 * PASSAGE_CHARACTERS


def text_passages(text: str) -> Iterator[str]:
    """Runs of whole lines of at least `PASSAGE_CHARACTERS` characters; the last may be shorter.

    Lines of several passages' length, such as those of a text without line ends, are cut first.
    """
    yield from _runs(chain.from_iterable(map(_pieces, text.splitlines(keepends=True))), "")


def joined(documents: Sequence[str]) -> list[str]:
    """`documents` as passages of neighbours, a line each, where their median is below `SHORT` characters; else as
    they are.

    Dealt one by one, the lines of one article would come to all three splits, each a unit of its own for the
    certificates: neighbours would be taken for independent draws of text. Nobody can see whether neighbours belong
    together; where they do not, joining them costs units and nothing else.
    """
    if not documents or median(map(len, documents)) >= SHORT:
        return list(documents)
    return list(_runs(documents, "\n"))


def _runs(lines: Iterable[str], between: str) -> Iterator[str]:
    run: list[str] = []
    length = 0
    for line in lines:
        run.append(line)
        length += len(line)
        if length >= PASSAGE_CHARACTERS:
            yield between.join(run)
            run, length = [], 0
    if run:
        yield between.join(run)


def _pieces(line: str) -> Iterator[str]:
    """A line, or, where it is long, pieces of it of about a passage's length, cut behind a space if there is any."""
    start = 0
    while len(line) > _LONG_LINE and len(line) - start > PASSAGE_CHARACTERS:
        stop = line.rfind(" ", start, start + PASSAGE_CHARACTERS) + 1 or start + PASSAGE_CHARACTERS
        yield line[start:stop]
        start = stop
    yield line[start:]
