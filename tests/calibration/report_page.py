"""A report's page taken apart, for the tests of the report."""

from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser

from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.page import report_sections
from exeunt.calibration.report.parts import Cell, Details, Part, Section, Table

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Tags(HTMLParser):
    """Notes every element with its attributes, and that all are closed in turn."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def parts_of(sections: list[Section]) -> Iterator[Part]:
    for section in sections:
        yield from flat(section.parts)


def flat(parts: tuple[Part, ...]) -> Iterator[Part]:
    for part in parts:
        yield part
        if isinstance(part, Details):
            yield from flat(part.parts)


@cache
def _sections(number: int) -> list[Section]:
    return report_sections(_held[number])


_held: dict[int, ReportContent] = {}


def sections(found: ReportContent) -> list[Section]:
    """The sections of a report, drawn once."""
    _held[id(found)] = found  # kept, so that the number stays its own
    return _sections(id(found))


def table(found: ReportContent, section: str, header: str) -> Table:
    """The first table of a section that has a column of that name."""
    own = next(each for each in sections(found) if each.name == section)
    return next(part for part in flat(own.parts) if isinstance(part, Table) and header in part.headers)


def column(found: Table, header: str) -> list[Cell]:
    return [row[found.headers.index(header)] for row in found.cells()]
