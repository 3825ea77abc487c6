"""Markdown pages of which a script writes parts: tables by their headers, and regions between two comments.

What stands around a region is written by hand, and stays. A region's key is its name in the comment in front of it:

    <!-- KEY: written by scripts.result_tables -->
    ...
    <!-- end of KEY -->
"""

import re
from collections.abc import Iterable, Sequence
from typing import Final

_FIRST: Final = re.compile(r"^<!-- (.+): written by scripts\.result_tables -->$", re.MULTILINE)
_HEADING: Final = re.compile(r"^#+ ", re.MULTILINE)


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table's text, without a newline at its end."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def with_tables(text: str, tables: Sequence[str]) -> str:
    """A page with each table in the place of the one whose first column has the same header.

    Raises ValueError where there is none.
    """
    for table in tables:
        head = table.split(" | ")[0] + " |"
        start = text.find("\n" + head)
        if start < 0:
            raise ValueError(f"the page has no table that begins {head!r}")
        end = text.find("\n\n", start)
        text = text[: start + 1] + table + (text[end:] if end >= 0 else "\n")
    return text


def region(key: str, content: str) -> str:
    """A region's text, without a newline at its end."""
    return f"<!-- {key}: written by scripts.result_tables -->\n\n{content.strip()}\n\n{_end(key)}"


def region_keys(text: str) -> list[str]:
    """The keys of a page's regions, in their order."""
    return _FIRST.findall(text)


def with_region(text: str, key: str, content: str) -> str:
    """A page with another content of a region that it has. Raises ValueError where it has none, or several."""
    start, end = _span(text, key)
    return text[:start] + region(key, content) + text[end:]


def section_end(text: str, key: str) -> int:
    """Where the next heading behind a region begins, or the page ends. Raises ValueError where there is no region."""
    _, end = _span(text, key)
    heading = _HEADING.search(text, end)
    return heading.start() if heading else len(text)


def _end(key: str) -> str:
    return f"<!-- end of {key} -->"


def _span(text: str, key: str) -> tuple[int, int]:
    found = [match.start() for match in _FIRST.finditer(text) if match[1] == key]
    if len(found) != 1:
        raise ValueError(f"the page has {len(found)} regions {key!r}, not one")
    end = text.find(_end(key), found[0])
    if end < 0:
        raise ValueError(f"the page's region {key!r} has no end")
    return found[0], end + len(_end(key))
