"""The command line's options that several commands share, and what every command does with them."""

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import typer

from exeunt.deploy.arguments import LOG_LEVELS, one_of, whole
from exeunt.deploy.json_file import JSONFile
from exeunt.server.settings import setting_help

_PIPE_COLUMNS: Final = 240  # every mode's name and every interval on one line


@dataclass(slots=True)
class Wishes:
    """What is asked of the command line itself, whichever command it is."""

    tracebacks: bool = False


def count(flag: str, least: int, text: str) -> Any:
    """The option `flag`, a whole number from `least` on."""
    return typer.Option(metavar="N", help=text, parser=whole(flag, least))


def _note_level(context: typer.Context, level: str | None) -> str | None:
    """Take down that tracebacks are wanted, before the other options are looked at: those may be wrong."""
    if level == "debug" and isinstance(context.obj, Wishes):
        context.obj.tracebacks = True
    return level


BUNDLE: Final = typer.Argument(
    metavar="BUNDLE", help="A bundle's directory, as `exeunt calibrate --out` wrote it."
)
DEVICE: Final = typer.Option(help="auto, cpu, cuda or cuda:N.")
JSON: Final = typer.Option("--json", help="Also write it as JSON to this file.")
LEVEL: Final = typer.Option(
    metavar="LEVEL",
    help="What to log: debug (with tracebacks of errors), info, warning or error.",
    envvar="EXEUNT_LOG_LEVEL",
    show_envvar=False,
    is_eager=True,
    callback=_note_level,
)
SERVER_LEVEL: Final = typer.Option(
    metavar="LEVEL",
    help=setting_help("log_level"),
    show_default=False,
    envvar="EXEUNT_LOG_LEVEL",
    show_envvar=False,
    is_eager=True,
    callback=_note_level,
)


def log_from(level: str) -> None:
    """Log what is of `level` or graver. Raises UsageError for a level that there is not."""
    from exeunt.deploy.logs import configure_logging

    configure_logging(one_of("--log-level", level, *LOG_LEVELS), as_json=False)


def json_target(path: Path | None, *, model: Path | str, data: str | None = None) -> JSONFile | None:
    """The file of `--json`, if one is wanted, looked at before any work.

    Raises UsageError where it cannot be written, or would be written into the folder `model` or over the text `data`.
    """
    return None if path is None else JSONFile.checked(path, model=model, data=data)


def show(table: Any) -> None:
    """Print a table: as wide as the terminal, and as wide as it wants where it goes to a file or a pipe."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=_PIPE_COLUMNS)).print(table)


def verifying() -> Any:
    """A bar for the reading of large files, where a person looks on."""
    from exeunt.calibration.progress import TerminalProgress

    return TerminalProgress().phase("Verifying the bundle", 1) if sys.stderr.isatty() else nullcontext()
