"""What stands on the command line, turned into values; what cannot be meant is said in one sentence."""

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import typer

from exeunt.server.settings import setting_help

LOG_LEVELS: Final = ("debug", "info", "warning", "error")


class UsageError(Exception):
    """Arguments that cannot be meant; the process ends with status 2."""


def setting(name: str, metavar: str) -> Any:
    """The option of the server's setting `name`; its words and its default are the setting's own."""
    return typer.Option(metavar=metavar, help=setting_help(name), show_default=False)


def whole(flag: str, least: int) -> Callable[[Any], int]:
    """A parser of whole numbers from `least` on, for the option `flag`. It raises UsageError."""

    def parse(value: Any) -> int:
        text = str(value)
        if not text.removeprefix("-").isdecimal() or not text.isascii():
            raise UsageError(f"{flag} is {text!r}; it must be a whole number of at least {least}.")
        if int(text) < least:
            raise UsageError(f"{flag} is {text}; it must be at least {least}.")
        return int(text)

    return parse


def one_of(flag: str, value: str, *allowed: str) -> Any:
    """`value`, which must be one of `allowed`. Raises UsageError."""
    if value not in allowed:
        shown = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
        raise UsageError(f"{flag} is {value!r}; it must be {shown}.")
    return value


def numbers(flag: str, text: str, kind: type[int] | type[float]) -> tuple[Any, ...]:
    """The numbers in `text`, which commas part. Raises UsageError."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"{flag} is {text!r}; it must be {what} with commas between them.") from None


def block(flag: str, text: str) -> Any:
    """`auto`, `none`, or the number of a block. Raises UsageError."""
    if text in ("auto", "none"):
        return text
    if not (text.isdecimal() and text.isascii()):
        raise UsageError(f"{flag} is {text!r}; it must be auto, none, or the number of a block.")
    return int(text)


def is_address(target: str) -> bool:
    """Whether `target` is the address of a server, and not a folder or a model's id."""
    return target.startswith(("http://", "https://"))


def lacks_scheme(target: str) -> bool:
    """Whether `target` looks like the address of a server without http://, as 127.0.0.1:8000 does."""
    found = re.fullmatch(r"[\w.-]+:\d{1,5}/?|\[[0-9a-fA-F:]+\]:\d{1,5}/?", target)
    return found is not None and not Path(target).exists()


def misused(error: Any, arguments: Sequence[str]) -> str:
    """What to say of a usage error of the command line's parser: what was wrong, the likeliest word, where to look.

    Args:
        error: what the parser raised, with its own message.
        arguments: the words on the command line, the command first.
    """
    message, guess = error.format_message().rstrip("."), ""
    command = f" {arguments[0]}" if arguments and not arguments[0].startswith("-") else ""
    if message.startswith("No such option"):
        message = f"There is no option {error.option_name}"
        guess = next(
            iter(get_close_matches(error.option_name, error.possibilities or (), n=1, cutoff=0.7)), ""
        )
    elif found := re.match(r"No such command '(.+?)'(?:\. Did you mean '(.+?)')?", message):
        message, guess, command = f"There is no command {found[1]}", found[2], ""
    meant = f"; did you mean {guess}?" if guess else ";"
    return f"{message}{meant} `exeunt{command} --help` lists what there is."
