"""Checks that README.md and docs/ tell the truth: links lead somewhere, commands exist, requests are answered as shown.

    python scripts/check_readme.py                 everything; starts `exeunt serve` when a page shows a curl request
    python scripts/check_readme.py --no-server     without the requests
    python scripts/check_readme.py --url URL       the requests go to a server that already runs
    python scripts/check_readme.py FILE...         other pages than README.md and docs/*.md

Looked at are fences marked bash, sh, shell or console, and code in the running text that begins with `make` or
`exeunt`. A curl command is sent to a real server; a json fence right after it must have the shape of the real answer
(the same keys and types, whatever the values), and a fence of `data:` lines the shape of the real events. In a shown
answer a line of dots stands for what was left out.

It does not run other commands: it checks that what they name exists.
"""

import argparse
import json
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = "http://127.0.0.1:8000"  # where the pages say that the server is
SHELLS = {"bash", "sh", "shell", "console"}
OPEN_MAPS = {"by_exit"}  # objects whose keys depend on what happened
START_TIMEOUT_S = 30 * 60  # the first start calibrates
PLAIN_PROGRAMS = {"git", "cd", "jq", "head", "apt-get", "sudo", "source", "export"}  # nothing of ours in them


@dataclass(frozen=True, slots=True)
class Problem:
    """Something a page says that is not so."""

    page: Path
    line: int
    message: str

    def __str__(self) -> str:
        page = self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page
        return f"{page}:{self.line}: {self.message}"


@dataclass(frozen=True, slots=True)
class Fence:
    """A fenced block of code; `line` is that of its first line of text."""

    language: str
    text: str
    line: int


@dataclass(frozen=True, slots=True)
class Request:
    """What a curl command asks for."""

    method: str
    path: str
    headers: dict[str, str]
    body: str | None


class ShownWrongError(Exception):
    """A page shows something that is not so; the message says what."""


# -- reading pages --


def fences(text: str) -> list[Fence]:
    """The fenced blocks of a page."""
    found = []
    for match in re.finditer(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, match.start(3)) + 1
        found.append(Fence(match[2], match[3], line))
    return found


def without_fences(text: str) -> str:
    """The running text, blank lines in place of fences."""
    pattern = r"^( *)```.*?^\1```"
    return re.sub(pattern, lambda match: re.sub(r"[^\n]", "", match[0]), text, flags=re.MULTILINE | re.DOTALL)


def commands(fence: Fence) -> Iterator[tuple[int, str]]:
    """(line, command) of a shell fence; continued lines are joined, prompts, comments and output left out."""
    prompted = fence.language == "console"
    pending, start = "", 0
    for offset, raw in enumerate(fence.text.splitlines()):
        line = raw
        if not pending:
            start = fence.line + offset
            if prompted and not line.startswith("$ "):
                continue
            line = line.removeprefix("$ ")
        pending += line + "\n"
        if line.endswith("\\") or _has_open_quote(pending):
            continue
        if pending.strip() and not pending.lstrip().startswith("#"):
            yield start, pending.replace("\\\n", " ").strip()
        pending = ""
    if pending.strip():
        yield start, pending.strip()


def _has_open_quote(text: str) -> bool:
    try:
        shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError:
        return True
    return False


# -- links --


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


# -- commands --


def check_command(command: str) -> None:
    """Raises ShownWrongError when the command names something that does not exist."""
    for part in _split(command):
        words = list(part)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            _check_variable(words.pop(0).partition("=")[0])
        if not words:
            continue
        program = Path(words[0]).name
        if program in CHECKS:
            CHECKS[program](words[1:])
        elif (ROOT / words[0]).is_file() or program in PLAIN_PROGRAMS:
            continue
        else:
            raise ShownWrongError(
                f"`{program}` is not known; teach scripts/check_readme.py what to check of it"
            )


def _split(command: str) -> list[list[str]]:
    """The commands of a pipeline or list, as words."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&;"):
            parts.append([])
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


def _check_variable(name: str) -> None:
    if not name.startswith("EXEUNT_"):
        return
    from exeunt.server.settings import Settings

    known = {f"EXEUNT_{field.upper()}" for field in Settings.model_fields} | {
        "EXEUNT_NATIVE",
        "EXEUNT_SHARED",
    }
    if name not in known:
        raise ShownWrongError(f"there is no variable {name}")


def _check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in words:
        if "=" not in word and not word.startswith("-") and word not in targets:
            raise ShownWrongError(f"the Makefile has no target {word}")


def _check_exeunt(words: list[str]) -> None:
    from typer.main import get_command

    from exeunt.deploy.cli import app

    group: Any = get_command(app)
    if not words or words[0].startswith("-"):
        known, given = {"--help", "-h"}, words
    elif words[0] not in group.commands:
        raise ShownWrongError(
            f"there is no `exeunt {words[0]}`; there are {', '.join(sorted(group.commands))}"
        )
    else:
        params = group.commands[words[0]].params
        known = {name for param in params for name in (*param.opts, *param.secondary_opts)} | {"--help", "-h"}
        given = words[1:]
    for word in given:
        if word.startswith("--") and word.partition("=")[0] not in known:
            raise ShownWrongError(f"`exeunt {words[0]}` has no option {word.partition('=')[0]}")


def _check_python(words: list[str]) -> None:
    for word in words:
        if word.endswith(".py") and not (ROOT / word).is_file():
            raise ShownWrongError(f"there is no {word}")


def _check_docker(words: list[str]) -> None:
    stages = set(re.findall(r"^FROM .* AS (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    for flag, value in pairwise(words):
        if flag in ("-f", "--file") and not (ROOT / value).is_file():
            raise ShownWrongError(f"there is no {value}")
        if flag == "--target" and value not in stages:
            raise ShownWrongError(f"the Dockerfile has no target {value}")


def _check_pip(words: list[str]) -> None:
    for flag, value in pairwise(words):
        if flag in ("-c", "-r") and not (ROOT / value).is_file():
            raise ShownWrongError(f"there is no {value}")


def _check_curl(words: list[str]) -> None:
    read_curl(words)


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": _check_make,
    "exeunt": _check_exeunt,
    "python": _check_python,
    "python3": _check_python,
    "docker": _check_docker,
    "pip": _check_pip,
    "curl": _check_curl,
}


def check_commands(page: Path, text: str) -> Iterator[Problem]:
    """Every command in shell fences, and `make ...` and `exeunt ...` in the running text."""
    shown = [pair for fence in fences(text) if fence.language in SHELLS for pair in commands(fence)]
    prose = without_fences(text)
    for match in re.finditer(r"`((?:make|exeunt) [^`\n]+)`", prose):
        shown.append((prose.count("\n", 0, match.start()) + 1, match[1]))
    for line, command in shown:
        try:
            check_command(command)
        except ShownWrongError as problem:
            yield Problem(page, line, str(problem))
        except ValueError as problem:  # shlex
            yield Problem(page, line, f"not a shell command ({problem}): {command}")


# -- requests --


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
            raise ShownWrongError(f"curl's option {word} is not known; teach scripts/check_readme.py")
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
        asked = [words for _, command in commands(fence) for words in _split(command) if words[0] == "curl"]
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


def compare_answer(shown: str, real: str) -> list[str]:
    """How the shape of a shown answer (JSON, or lines of `data:`) differs from that of the real one."""
    if shown.lstrip().startswith("data:"):
        return _compare_events(shown, real)
    try:
        example = json.loads(_filled(shown))
    except json.JSONDecodeError as error:
        return [f"it is not JSON ({error})"]
    return list(differences(example, json.loads(real), elided=shown != _filled(shown)))


def _compare_events(shown: str, real: str) -> list[str]:
    def data(text: str) -> list[str]:
        return [line.removeprefix("data:").strip() for line in text.splitlines() if line.startswith("data:")]

    events = data(real)
    found = []
    for event in data(shown):
        if event == "[DONE]":
            if events[-1:] != ["[DONE]"]:
                found.append("the stream does not end in [DONE]")
            continue
        example = json.loads(_filled(event))
        candidates = [json.loads(other) for other in events if other.startswith("{")]
        if not any(not list(differences(example, other, elided=False)) for other in candidates):
            found.append(f"no event is like {event[:80]}")
    return found


def _filled(shown: str) -> str:
    """A shown answer as JSON: lines of dots, dots at the end of a list, and comments are left out."""
    text = re.sub(r"^\s*(\.\.\.|…),?\s*$", "", shown, flags=re.MULTILINE)
    text = re.sub(r",?\s*(\.\.\.|…)\s*(?=[\]}])", "", text)
    text = re.sub(r"\s+//[^\n\"]*$", "", text, flags=re.MULTILINE)
    return re.sub(r",(\s*[\]}])", r"\1", text)


def differences(shown: Any, real: Any, at: str = "", *, elided: bool = False) -> Iterator[str]:
    """Where the shapes of two JSON values differ. `elided`: the shown one leaves keys out."""
    here = at or "the answer"
    if isinstance(shown, dict) and isinstance(real, dict):
        if at.rpartition(".")[2] in OPEN_MAPS:
            return
        if (missing := sorted(set(real) - set(shown))) and not elided:
            yield f"{here} lacks {', '.join(missing)}"
        if extra := sorted(set(shown) - set(real)):
            yield f"{here} has no {', '.join(extra)}"
        for key in sorted(set(shown) & set(real)):
            yield from differences(shown[key], real[key], f"{at}.{key}" if at else key, elided=elided)
    elif isinstance(shown, list) and isinstance(real, list):
        for index, item in enumerate(shown if real else []):
            yield from differences(item, real[0], f"{at}[{index}]", elided=elided)
        if shown and not real:
            yield f"{here} is empty"
    elif _kind(shown) != _kind(real):
        yield f"{here} is {_kind(real)}, not {_kind(shown)}"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names[type(value)]


# -- running --


@contextmanager
def running_server() -> Iterator[str]:
    """`exeunt serve` with the packaged model on a free port; its URL, once it is ready."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    program = Path(sys.executable).with_name("exeunt")
    process = subprocess.Popen([str(program), "serve", "--port", str(port), "--log-level", "warning"])
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _is_ready(url):
            if process.poll() is not None:
                raise SystemExit(f"exeunt serve ended with status {process.returncode} before it was ready")
            if time.monotonic() > deadline:
                raise SystemExit(f"exeunt serve was not ready within {START_TIMEOUT_S} s")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).is_success
    except httpx.TransportError:
        return False


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


def main() -> int:
    """Check the pages named, else README.md and docs/*.md; 0 when all is well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--no-server", action="store_true", help="do not send the requests shown")
    parser.add_argument("--url", help="send the requests shown to this server")
    arguments = parser.parse_args()
    pages = arguments.pages or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    problems = check(
        [page.resolve() for page in pages], with_server=not arguments.no_server, url=arguments.url
    )
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(pages)} pages, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
