"""Links of a page: they lead to a file, and to a heading where they name one."""

import re
from collections.abc import Iterator
from pathlib import Path

from scripts.check_readme.pages import Problem, without_fences


def check_links(page: Path, text: str) -> Iterator[Problem]:
    """Relative links must lead to a file, and to a heading where they name one."""
    prose = without_fences(text)
    for match in re.finditer(r"\[[^\]]*\]\(([^)\s]+)\)", prose):
        target, _, anchor = match[1].partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        line = prose.count("\n", 0, match.start()) + 1
        file = (page.parent / target).resolve() if target else page
        if not file.exists():
            yield Problem(page, line, f"the link {match[1]} leads nowhere")
        elif anchor and file.suffix == ".md" and anchor not in _anchors(file.read_text()):
            yield Problem(page, line, f"{target or page.name} has no heading #{anchor}")


def _anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", without_fences(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
