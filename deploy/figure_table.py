"""Tables of figures that fit the terminal: what is too wide is left out and named; no number is ever cut short."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

LEAST_NAME: Final = 16
"""Characters that names of modes are wrapped at before figures give way."""

Form = Literal["whole", "brief", "out"]


@dataclass(frozen=True, slots=True)
class FigureColumn:
    """One column of figures, a cell for each row.

    `brief` are the same cells without what `extra` names (intervals, say), for narrow terminals; None: there is nothing
    to leave away. Where columns have to give way, those of the lowest `worth` do first.
    """

    header: str
    cells: tuple[str, ...]
    worth: int
    brief: tuple[str, ...] | None = None
    extra: str = ""

    def shown(self, form: Form) -> tuple[str, ...]:
        """The cells in a form."""
        return self.brief if form == "brief" and self.brief is not None else self.cells

    def width(self, form: Form) -> int:
        """Characters that the cells need; headers are wrapped at their words."""
        return max(map(len, (*self.header.split(), *self.shown(form))))


@dataclass(frozen=True, slots=True)
class FigureTable:
    """One line a mode: its name and its figures. Printed, it takes the form that the console has room for.

    `title_whole` is added to the title where a column is shown with its extra.
    """

    names: tuple[str, ...]
    columns: tuple[FigureColumn, ...]
    title: str = ""
    title_whole: str = ""
    caption: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table, and below it what there was no room for."""
        forms = self.forms(options.max_width)
        yield self._table(forms, options.max_width)
        if notes := [*([self.caption] if self.caption else []), *self._left_out(forms)]:
            yield Text("\n".join(notes), style="dim")

    def forms(self, width: int) -> list[Form]:
        """The columns' forms in a console of `width` characters: the best that fit, or the narrowest there are."""
        forms: list[Form] = []
        for forms in self._narrowing():
            if LEAST_NAME + self._figures_width(forms) <= width:
                break
        return forms

    def _narrowing(self) -> Iterator[list[Form]]:
        """All whole; then one after another without its extra; then one after another out, but for the last."""
        forms: list[Form] = ["whole"] * len(self.columns)
        yield list(forms)
        order = sorted(range(len(self.columns)), key=lambda place: self.columns[place].worth)
        for place in order:
            if self.columns[place].brief is not None:
                forms[place] = "brief"
                yield list(forms)
        for place in order[:-1]:
            forms[place] = "out"
            yield list(forms)

    def _shown(self, forms: Sequence[Form]) -> Iterator[tuple[FigureColumn, Form]]:
        return ((column, form) for column, form in zip(self.columns, forms, strict=True) if form != "out")

    def _figures_width(self, forms: Sequence[Form]) -> int:
        """Characters of all columns but the names', each with the blank before it."""
        return sum(1 + column.width(form) for column, form in self._shown(forms))

    def _table(self, forms: Sequence[Form], width: int) -> Table:
        room = width - self._figures_width(forms)
        name_width = max(1, min(room, max(map(len, ("mode", *self.names)))))
        shown = list(self._shown(forms))
        gap = 1 if room - name_width >= len(shown) else 0
        with_extra = any(form == "whole" and column.brief is not None for column, form in shown)
        title = "; ".join(part for part in (self.title, self.title_whole if with_extra else "") if part)
        table = Table(
            title=Text(title) if title else None,
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, gap, 0, 0),
        )
        table.add_column("mode", width=name_width, overflow="fold")
        for column, form in shown:
            table.add_column(Text(column.header), width=column.width(form), justify="right", overflow="fold")
        for row, name in enumerate(self.names):
            table.add_row(Text(name), *(Text(column.shown(form)[row]) for column, form in shown))
        return table

    def _left_out(self, forms: Sequence[Form]) -> list[str]:
        """One line that names what the terminal is too narrow for, if anything."""
        pairs = list(zip(self.columns, forms, strict=True))
        without = [column for column, form in pairs if form == "brief"]
        extras = dict.fromkeys(column.extra for column in without)
        named = [
            f"{extra} ({', '.join(column.header for column in without if column.extra == extra)})"
            for extra in extras
        ]
        named += [column.header for column, form in pairs if form == "out"]
        if not named:
            return []
        return [f"Not shown for want of width: {', '.join(named)}; --json FILE has all."]
