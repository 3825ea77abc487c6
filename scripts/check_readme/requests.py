"""Requests that a page shows as curl commands: sent to a real server, their answers compared with those shown."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from scripts.check_readme.answers import compare_answer
from scripts.check_readme.pages import ADDRESS, SHELLS, Fence, Problem, ShownWrongError, commands, fences
from scripts.check_readme.shell import split


@dataclass(frozen=True, slots=True)
class Request:
    """What a curl command asks for."""

    method: str
    path: str
    headers: dict[str, str]
    body: str | None


def read_curl(words: Sequence[str]) -> Request:
    """What a curl command asks for; ShownWrongError for options not known here and other servers than ADDRESS."""
    method, url, body = "", "", None
    headers: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word in ("-X", "--request"):
            method = rest.pop(0)
        elif word in ("-H", "--header"):
            name, _, value = rest.pop(0).partition(":")
            headers[name.strip().lower()] = value.strip()
        elif word in ("-d", "--data", "--data-raw", "--data-binary", "--json"):
            body = rest.pop(0)
            if word == "--json":
                headers.setdefault("content-type", "application/json")
        elif re.fullmatch(r"-[sSNifkLv]+|--(silent|no-buffer|show-error|include|fail)", word):
            continue
        elif word.startswith("-"):
            raise ShownWrongError(f"curl's option {word} is not known; teach scripts/check_readme")
        else:
            url = word
    url = url.replace("localhost", "127.0.0.1")
    if "://" not in url:
        url = f"http://{url}"
    if not url.startswith(ADDRESS):
        raise ShownWrongError(f"curl asks {url or 'nobody'}; the server is at {ADDRESS}")
    return Request(
        method or ("POST" if body is not None else "GET"), url.removeprefix(ADDRESS) or "/", headers, body
    )


def requests(text: str) -> list[tuple[Fence, Request, Fence | None]]:
    """Every curl command of a page with the fence that shows its answer, if one follows at once."""
    found = []
    blocks = fences(text)
    for index, fence in enumerate(blocks):
        if fence.language not in SHELLS:
            continue
        asked = [words for _, command in commands(fence) for words in split(command) if words[0] == "curl"]
        following = blocks[index + 1] if index + 1 < len(blocks) else None
        shows = following is not None and following.language in ("json", "text", "")
        for number, words in enumerate(asked):
            last = number == len(asked) - 1
            found.append((fence, read_curl(words[1:]), following if shows and last else None))
    return found


def check_requests(page: Path, text: str, server: str) -> Iterator[Problem]:
    """Every curl request must succeed and its answer look as shown."""
    with httpx.Client(base_url=server, timeout=120) as client:
        for fence, request, shown in requests(text):
            headers = (
                {"content-type": "application/json", **request.headers} if request.body else request.headers
            )
            answer = client.request(request.method, request.path, headers=headers, content=request.body)
            if not answer.is_success:
                message = (
                    f"{request.method} {request.path} is answered {answer.status_code}: {answer.text[:300]}"
                )
                yield Problem(page, fence.line, message)
            elif shown is not None:
                yield from (
                    Problem(page, shown.line, f"the answer shown is not like the real one: {difference}")
                    for difference in compare_answer(shown.text, answer.text)
                )
