"""Pages as they are written: their fences, their commands, and what is wrong with them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "http://127.0.0.1:8000"  # where the pages say that the server is
SHELLS = {"bash", "sh", "shell", "console"}


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


class ShownWrongError(Exception):
    """A page shows something that is not so; the message says what."""


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
