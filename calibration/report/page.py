"""The report for people: `report.html`, one file with everything in it, light or dark as the reader's system asks.

It needs no network and no script. Each section is a module of `exeunt.calibration.report.sections`, and left out where
there is nothing that it could tell; `page.html` and `page.css` lay the sections out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import Final

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from exeunt.calibration.report import drawing
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.parts import Figure, Finding, Part, Section
from exeunt.calibration.report.sections import BUILDERS
from exeunt.calibration.report.words import count

_ASSETS: Final = "exeunt.calibration.report"
_LIGHT: Final = {"line": "#d5d8dd", "raised": "#f2f4f6", "edge": "#1d243028", "fair": "#8a5a00"}
_DARK: Final = {"line": "#353b45", "raised": "#1f242c", "edge": "#00000090", "fair": "#e0b04a"}
_WRAPS: Final[dict[type, str]] = {Figure: "figures", Finding: "findings"}


@dataclass(frozen=True, slots=True)
class _Group:
    """Parts of one kind that follow one another; figures and findings stand side by side where there is room."""

    wrap: str
    parts: tuple[Part, ...]


def report_html(content: ReportContent) -> str:
    """The text of `report.html`."""
    base = content.manifest.base_model
    return _template("page.html").render(
        title=f"Calibration of {base.name}",
        subtitle=f"{base.architecture}, {count(base.parameters)} parameters in {base.blocks} blocks",
        made_by=f"Made by Exeunt {content.manifest.exeunt_version}.",
        sections=report_sections(content),
        colours=Markup(colours_css()),
        css=Markup(_asset("page.css").rstrip()),
        kind_of=lambda part: type(part).__name__,
        grouped=_grouped,
    )


def report_sections(content: ReportContent) -> list[Section]:
    """The sections that have something to tell, in the page's order."""
    return [section for build in BUILDERS if (section := build(content)) is not None]


def colours_css() -> str:
    """The page's colours as CSS variables, by what the reader's system prefers."""
    light, dark = (_rule(colours) for colours in (drawing.LIGHT | _LIGHT, drawing.DARK | _DARK))
    return f":root {{{light}}}\n@media (prefers-color-scheme: dark) {{ :root {{{dark}}} }}"


def _rule(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def _grouped(parts: Sequence[Part]) -> list[_Group]:
    return [_Group(_WRAPS.get(kind, ""), tuple(group)) for kind, group in groupby(parts, type)]


def _asset(name: str) -> str:
    return (files(_ASSETS) / name).read_text(encoding="utf-8")


@cache
def _template(name: str) -> Template:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(_asset(name))
