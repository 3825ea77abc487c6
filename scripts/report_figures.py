"""Pictures of a bundle's report as files of their own, for pages that show them outside it.

    python -m scripts.report_figures BUNDLE --out docs/images --figure trade-off --figure certificates

Each becomes `report-NAME.svg`: with its own background and with colours for both kinds of page, chosen by what the
reader's system prefers, since an image cannot take them from the page it stands on. Without --figure all are written.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from exeunt.calibration.report.drawing import DARK, LIGHT
from exeunt.compression.bundle import REPORT_HTML

_FIGURE: Final = re.compile(r'<svg id="figure-([^"]+)".*?</svg>', re.DOTALL)
_SIZE: Final = re.compile(r'viewBox="0 0 ([\d.]+) ([\d.]+)"')
_FONTS: Final = "--sans: system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif;"


class FigureError(ValueError):
    """A picture that cannot be had; the message is one sentence."""


def figures_of(page: str) -> dict[str, str]:
    """The pictures of a report's page by name, as they stand there."""
    return {found[1]: found[0] for found in _FIGURE.finditer(page)}


def standalone(svg: str) -> str:
    """A picture of the page as the text of an SVG file that needs no page."""
    size = _SIZE.search(svg)
    if size is None:
        raise FigureError("The picture has no viewBox; it is not one of a report.")
    style = f"<style>:root {{ {_FONTS} {_variables(LIGHT)} }}"
    style += f" @media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}"
    style += " text { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; stroke-linejoin: round }</style>"
    paper = f'<rect width="{size[1]}" height="{size[2]}" rx="6" style="fill: var(--paper)"/>'
    start = svg.index(">") + 1
    return f"{svg[:start]}\n{style}\n{paper}{svg[start:]}\n"


def write_figures(bundle: Path, out: Path, names: Sequence[str]) -> list[Path]:
    """Write the pictures called `names`, or all, of the report of `bundle` into `out`; the files written.

    Raises FigureError where the bundle has no report, or its report no such picture.
    """
    path = bundle / REPORT_HTML
    if not path.is_file():
        raise FigureError(f"{bundle} has no {REPORT_HTML}; give the directory of a bundle.")
    found = figures_of(path.read_text(encoding="utf-8"))
    missing = [name for name in names if name not in found]
    if missing:
        raise FigureError(f"The report has no figure {missing[0]!r}; it has {', '.join(found) or 'none'}.")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name in names or found:
        written.append(out / f"report-{name}.svg")
        written[-1].write_text(standalone(found[name]), encoding="utf-8")
    return written


def _variables(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, write the files, say which."""
    parser = argparse.ArgumentParser(description="Take pictures out of a bundle's report.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", action="append", default=[], help="a figure's name; may be given again")
    asked = parser.parse_args(arguments)
    try:
        for path in write_figures(asked.bundle, asked.out, asked.figure):
            print(path)
    except FigureError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
