"""What a report's sections are made of: words, figures and tables, as plain data that `page.html` lays out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Tone = Literal["", "good", "fair", "bad", "soft"]
"""How a figure is meant: what is safe or cheap, what wants a second thought, what is not to be used, what is aside."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table. `interval` stands small beneath the text; `strong` cells are those that were chosen."""

    text: str
    interval: str = ""
    tone: Tone = ""
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of as many cells as there are headers; plain strings are cells without any mark.

    The first `words` columns are words and stay left; the first column stays in sight where a table is scrolled.
    """

    headers: tuple[str, ...]
    rows: Sequence[Sequence[Cell | str]]
    words: int = 1
    caption: str = ""

    def cells(self) -> Iterator[list[Cell]]:
        """The rows, every cell a `Cell`."""
        for row in self.rows:
            yield [Cell(cell) if isinstance(cell, str) else cell for cell in row]


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture: `svg` is one whole element, `caption` says what to look at, and under what definition."""

    name: str  # unique in a report: what `scripts/report_figures.py` asks for
    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Listing:
    """Text as it was written, line by line: a sample, a request's JSON."""

    text: str
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """A sentence that decides something, with what it rests on."""

    title: str
    text: str
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Details:
    """What is folded away until it is asked for."""

    summary: str
    parts: "tuple[Figure | Table | Text | Listing, ...]"


Part = Figure | Table | Text | Listing | Finding | Details


@dataclass(frozen=True, slots=True)
class Section:
    """A chapter of the report: `shows` says what is to be seen, `limits` what it does not say."""

    name: str  # its anchor
    title: str
    shows: str
    limits: str
    parts: tuple[Part, ...]
