"""All that is wrong with some pages."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from scripts.check_readme.commands import check_commands
from scripts.check_readme.links import check_links
from scripts.check_readme.pages import Problem
from scripts.check_readme.requests import check_requests, requests
from scripts.check_readme.server import running_server


def check(pages: Sequence[Path], *, with_server: bool, url: str | None = None) -> list[Problem]:
    """All that is wrong with the pages."""
    texts = {page: page.read_text() for page in pages}
    problems = [
        problem
        for page, text in texts.items()
        for checker in (check_links, check_commands)
        for problem in checker(page, text)
    ]
    if problems:  # a request that could not be read would only fail again
        return problems
    asking = {page: text for page, text in texts.items() if requests(text)}
    if with_server and asking:
        with nullcontext(url) if url else running_server() as server:
            for page, text in asking.items():
                problems += check_requests(page, text, server)
    return problems
