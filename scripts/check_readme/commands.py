"""Commands of a page: what they name exists."""

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from scripts.check_readme.pages import (
    ROOT,
    SHELLS,
    Problem,
    ShownWrongError,
    commands,
    fences,
    without_fences,
)
from scripts.check_readme.requests import read_curl
from scripts.check_readme.shell import split

PLAIN_PROGRAMS = {"git", "cd", "jq", "head", "grep", "apt-get", "sudo", "source", "export"}  # not ours


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


def check_command(command: str) -> None:
    """Raises ShownWrongError when the command names something that does not exist."""
    for part in split(command):
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
            raise ShownWrongError(f"`{program}` is not known; teach scripts/check_readme what to check of it")


def _check_variable(name: str) -> None:
    if not name.startswith("EXEUNT_"):
        return
    from exeunt.server.settings import Settings

    known = {f"EXEUNT_{field.upper()}" for field in Settings.model_fields} | {"EXEUNT_NATIVE"}
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
