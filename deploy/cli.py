"""The command line: `exeunt calibrate`, `serve`, `eval`, `bench` and `inspect`.

Errors are one line that says what was wrong and what to do, with exit status 2 for wrong usage and 1 for everything
else (`exeunt.deploy.failures`); `--log-level debug` (or EXEUNT_LOG_LEVEL=debug) adds the traceback. What a command
needs is imported by that command alone, so that `--help` answers at once.
"""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from exeunt.deploy.arguments import LOG_LEVELS, UsageError, block, is_address, numbers, one_of, setting, whole
from exeunt.deploy.failures import told
from exeunt.deploy.json_file import JSONFile
from exeunt.deploy.signals import (
    Interrupted,
    InterruptibleProgress,
    end_at_once,
    interruptible,
    leave_to,
)
from exeunt.server.settings import setting_help

app = typer.Typer(
    name="exeunt",
    help="An inference server that spends on each token only the computation that token needs.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_PIPE_COLUMNS: Final = 240  # every mode's name and every interval on one line


@dataclass(slots=True)
class _Wishes:
    """What is asked of the command line itself, whichever command it is."""

    tracebacks: bool = False


def _count(flag: str, least: int, text: str) -> Any:
    """The option `flag`, a whole number from `least` on."""
    return typer.Option(metavar="N", help=text, parser=whole(flag, least))


def _note_level(context: typer.Context, level: str | None) -> str | None:
    """Take down that tracebacks are wanted, before the other options are looked at: those may be wrong."""
    if level == "debug" and isinstance(context.obj, _Wishes):
        context.obj.tracebacks = True
    return level


_BUNDLE = typer.Argument(metavar="BUNDLE", help="A bundle's directory, as `exeunt calibrate --out` wrote it.")
_CHECKPOINT = typer.Argument(metavar="MODEL", help="A checkpoint's directory or a Hugging Face id.")
_CALIBRATION_TEXT = typer.Option(
    help="Text to calibrate on: a file (txt or JSONL), a folder, or hf:NAME. Needed, but for the packaged model, "
    "which has a text of its own."
)
_EXITS = typer.Option(help="`auto`, or the blocks that certified exits follow, e.g. 3,8.")
_DRAFTING_EXIT = typer.Option(
    help="`auto`, `none`, or the block that the exit follows which drafts when verified."
)
_WEIGHTS = typer.Option(help="both, or int4 or full alone: what the bundle holds, and can be asked for.")
_RISK = typer.Option(help="Disagreement targets of approximate exits.")
_SEED = _count(
    "--seed",
    0,
    "Same seed, same bundle, if `--exits` names exits and `--drafting-exit` is none: which pay is measured.",
)
_EVALUATION_TOKENS = _count(
    "--tokens",
    16,
    "Use so many tokens of it: whole documents in an order drawn from --seed, of a single document the beginning.",
)
_WINDOW = _count(
    "--window", 16, "Tokens that are read at a time; 512, or the model's context where that is shorter."
)
_STRIDE = _count(
    "--stride",
    1,
    "Let windows overlap: each is so many tokens behind the one before, and counts its last so many.",
)
_GENERATE = typer.Option("--generate", help="Also let every mode write, and have the full model read it.")
_EVALUATION_SEED = _count("--seed", 0, "Seed of the documents' order and of the intervals.")
_DEVICE = typer.Option(help="auto, cpu, cuda or cuda:N.")
_JSON = typer.Option("--json", help="Also write it as JSON to this file.")
_LEVEL = typer.Option(
    metavar="LEVEL",
    help="What to log: debug (with tracebacks of errors), info, warning or error.",
    envvar="EXEUNT_LOG_LEVEL",
    show_envvar=False,
    is_eager=True,
    callback=_note_level,
)
_SERVER_LEVEL = typer.Option(
    metavar="LEVEL",
    help=setting_help("log_level"),
    show_default=False,
    envvar="EXEUNT_LOG_LEVEL",
    show_envvar=False,
    is_eager=True,
    callback=_note_level,
)


def _print_version(wanted: bool) -> None:
    """Print which Exeunt this is and end the command line, with status 0."""
    if wanted:
        print(f"exeunt {version('exeunt')}")
        raise typer.Exit


@app.callback()
def _exeunt(
    shown: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and leave.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Take what is asked before any command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with its exit status.

    A signal ends it at once until a command, its imports done, has begun what is to be unwound.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    leave_to(end_at_once)
    status = run(words)
    leave_to(signal.SIG_IGN)  # the interpreter is taken apart: a handler would only break into that
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Run one command; its exit status. Whatever goes wrong is told in one line on standard error.

    No command at all is a wish for help: on standard output, with status 0, as `--help`.
    """
    wishes = _Wishes()
    try:
        status = app(arguments or ["--help"], prog_name="exeunt", standalone_mode=False, obj=wishes)
    except Interrupted as interruption:  # everything is cleaned up: a half-made bundle, temporary files
        words = f"{interruption.word} before it was done; nothing was written"
        return _complain(words, 128 + interruption.number)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except Exception as error:  # noqa: BLE001 - the outermost boundary: a line instead of a traceback
        if wishes.tracebacks:
            traceback.print_exc()
        return _complain(*told(error, arguments))
    return status if isinstance(status, int) else 0


def _complain(message: str, status: int) -> int:
    line = " ".join(message.split())
    print(f"exeunt: {line}", file=sys.stderr)
    return status


def _log_from(level: str) -> None:
    """Log what is of `level` or graver. Raises UsageError for a level that there is not."""
    from exeunt.deploy.logs import configure_logging

    configure_logging(one_of("--log-level", level, *LOG_LEVELS), as_json=False)


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[BUNDLE|MODEL]",
            help="A bundle, a checkpoint's directory or a Hugging Face id; without it the packaged model, "
            "calibrated on first use.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str | None, setting("host", "ADDRESS")] = None,
    port: Annotated[str | None, setting("port", "N")] = None,
    api_key: Annotated[str | None, setting("api_key", "KEY")] = None,
    served_model_name: Annotated[str | None, setting("served_model_name", "NAME")] = None,
    device: Annotated[str | None, setting("device", "DEVICE")] = None,
    dtype: Annotated[str | None, setting("dtype", "DTYPE")] = None,
    weights: Annotated[str | None, setting("weights", "WHICH")] = None,
    max_model_len: Annotated[str | None, setting("max_model_len", "N")] = None,
    max_num_seqs: Annotated[str | None, setting("max_num_seqs", "N")] = None,
    max_num_queued_reqs: Annotated[str | None, setting("max_num_queued_reqs", "N")] = None,
    max_num_batched_tokens: Annotated[str | None, setting("max_num_batched_tokens", "N")] = None,
    kv_cache_memory: Annotated[str | None, setting("kv_cache_memory", "BYTES")] = None,
    default_compression: Annotated[str | None, setting("default_compression", "JSON")] = None,
    audit_share: Annotated[str | None, setting("audit_share", "SHARE")] = None,
    exit_guard: Annotated[
        bool | None, typer.Option("--exit-guard", help=setting_help("exit_guard"), show_default=False)
    ] = None,
    scheduling: Annotated[str | None, setting("scheduling", "POLICY")] = None,
    longest_wait: Annotated[str | None, setting("longest_wait", "SECONDS")] = None,
    request_timeout: Annotated[str | None, setting("request_timeout", "SECONDS")] = None,
    shutdown_timeout: Annotated[str | None, setting("shutdown_timeout", "SECONDS")] = None,
    max_body_bytes: Annotated[str | None, setting("max_body_bytes", "BYTES")] = None,
    allowed_origins: Annotated[str | None, setting("allowed_origins", "LIST")] = None,
    log_level: Annotated[str | None, _SERVER_LEVEL] = None,
    log_json: Annotated[
        bool | None, typer.Option("--log-json", help=setting_help("log_json"), show_default=False)
    ] = None,
) -> int:
    """Serve a bundle or a model over HTTP.

    Every option is also an environment variable: --max-num-seqs is EXEUNT_MAX_NUM_SEQS.
    """
    return _serve(_settings({name: value for name, value in locals().items() if value is not None}))


def _serve(settings: Any) -> int:
    """Log as the settings say, take the address, and serve until told to stop; the exit status."""
    from exeunt.deploy.logs import configure_logging
    from exeunt.server.settings import unknown_variables

    configure_logging(settings.log_level, as_json=settings.log_json)
    for name in unknown_variables(os.environ):
        logging.getLogger("exeunt.settings").warning(
            "%s is no setting; `exeunt serve --help` lists what there is.", name
        )
    from exeunt.deploy.serve import bind, serve

    with bind(settings.host, settings.port) as sock:
        return serve(settings, sock)


def _settings(given: dict[str, Any]) -> Any:
    """The settings of flags and environment; raises UsageError that names the flag."""
    from pydantic import ValidationError

    from exeunt.server.settings import invalid_setting, load_settings

    try:
        return load_settings(given)
    except ValidationError as error:
        raise UsageError(invalid_setting(error)) from error


@app.command()
def calibrate(
    model: Annotated[str, _CHECKPOINT],
    out: Annotated[Path, typer.Option(help="Where the bundle goes.", show_default=False)],
    data: Annotated[str | None, _CALIBRATION_TEXT] = None,
    tokens: Annotated[int, _count("--tokens", 1, "Use so many tokens of it.")] = 48_000,
    exits: Annotated[str, _EXITS] = "auto",
    drafting_exit: Annotated[str, _DRAFTING_EXIT] = "auto",
    linear_block: Annotated[str, typer.Option(help="`auto`, `none`, or the block to replace.")] = "auto",
    weights: Annotated[str, _WEIGHTS] = "both",
    kv: Annotated[str, typer.Option(help="int4 adds the INT4 KV cache, full does not.")] = "int4",
    risk: Annotated[str, _RISK] = "0.01,0.02,0.05,0.1",
    device: Annotated[str, _DEVICE] = "auto",
    seed: Annotated[int, _SEED] = 0,
    log_level: Annotated[str, _LEVEL] = "warning",
) -> None:
    """Make a bundle from a model: INT4 weights, a linear block, exits with certified thresholds."""
    _log_from(log_level)
    from exeunt.calibration.options import CalibrationOptions
    from exeunt.deploy.calibrate import calibration_data, check_checkpoint, check_out, make_bundle
    from exeunt.deploy.loading import resolve_device

    resolve_device(device)
    check_checkpoint(model)
    check_out(out)
    make_bundle(
        CalibrationOptions(
            model=model,
            out=out,
            tokens=tokens,
            exits="auto" if exits == "auto" else numbers("--exits", exits, int),
            drafting_exit=block("--drafting-exit", drafting_exit),
            linear_block=block("--linear-block", linear_block),
            weights=one_of("--weights", weights, "both", "int4", "full"),
            kv_cache=one_of("--kv", kv, "int4", "full"),
            risk=numbers("--risk", risk, float),
            device=device,
            seed=seed,
            data=calibration_data(model, data),
        )
    )


@app.command()
def inspect(
    bundle: Annotated[Path, _BUNDLE],
    json_file: Annotated[Path | None, _JSON] = None,
    log_level: Annotated[str, _LEVEL] = "warning",
) -> None:
    """Show what is inside a bundle, its sizes, how it was made, and its risk table."""
    _log_from(log_level)
    target = _json_target(json_file)
    from exeunt.compression.bundle import open_bundle
    from exeunt.deploy.inspect import describe, render

    _check_bundle(bundle)
    with _verifying():
        opened = open_bundle(bundle)
    _show(render(opened))
    if target is not None:
        target.write(describe(opened))


def _check_bundle(path: Path) -> None:
    """Raise UsageError or SettingsError where there is no bundle at `path`, intact or not."""
    from exeunt.deploy.loading import find_source

    if not path.exists():
        raise UsageError(f"{path} does not exist; give the folder that `exeunt calibrate --out` wrote.")
    if not find_source(str(path)).is_bundle:
        raise UsageError(f"{path} is a checkpoint; give the folder that `exeunt calibrate --out` wrote.")


def _verifying() -> Any:
    """A bar for the reading of large files, where a person looks on."""
    from exeunt.calibration.progress import TerminalProgress

    return TerminalProgress().phase("Verifying the bundle", 1) if sys.stderr.isatty() else nullcontext()


def _show(table: Any) -> None:
    """Print a table: as wide as the terminal, and as wide as it wants where it goes to a file or a pipe."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=_PIPE_COLUMNS)).print(table)


def _json_target(path: Path | None) -> JSONFile | None:
    """The file of `--json`, if one is wanted. Raises UsageError where it cannot be written, before any work."""
    return None if path is None else JSONFile.checked(path)


@app.command(name="eval")
def evaluate(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle or a checkpoint's directory.")],
    data: Annotated[
        str, typer.Option(help="Text: a file (txt or JSONL), a folder, or hf:NAME.", show_default=False)
    ],
    tokens: Annotated[int, _EVALUATION_TOKENS] = 16_000,
    seed: Annotated[int, _EVALUATION_SEED] = 0,
    window: Annotated[int | None, _WINDOW] = None,
    stride: Annotated[int | None, _STRIDE] = None,
    generate: Annotated[bool, _GENERATE] = False,
    device: Annotated[str, _DEVICE] = "auto",
    speed: Annotated[bool, typer.Option(help="Also measure every mode's tokens/s.")] = True,
    json_file: Annotated[Path | None, _JSON] = None,
    log_level: Annotated[str, _LEVEL] = "warning",
) -> None:
    """Measure perplexity, KL, agreement, depth and speed of every mode on a text."""
    _log_from(log_level)
    target = _json_target(json_file)
    from exeunt.calibration.evaluate import EvaluationOptions
    from exeunt.calibration.progress import watched_progress
    from exeunt.deploy.evaluation import evaluate_and_time, show_evaluation
    from exeunt.deploy.preparation import load_to_measure

    options = EvaluationOptions(tokens=tokens, window=window, stride=stride, seed=seed, generate=generate)

    with interruptible() as interruption:
        model = load_to_measure(bundle, device, InterruptibleProgress(watched_progress(), interruption))
        evaluated = evaluate_and_time(model, data, options, speed=speed)
        show_evaluation(evaluated, _show)
        if target is not None:
            target.write(evaluated.record(model.name))


@app.command()
def bench(
    target: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE|URL", help="A bundle (measured in process) or a server's http:// address."
        ),
    ],
    concurrency: Annotated[int, _count("--concurrency", 1, "Requests under way at once.")] = 8,
    prompt_tokens: Annotated[int, _count("--prompt-tokens", 1, "Length of every prompt.")] = 64,
    max_new_tokens: Annotated[int, _count("--max-new-tokens", 2, "Length of every answer.")] = 64,
    requests: Annotated[int | None, _count("--requests", 1, "Requests per mode. [4 × concurrency]")] = None,
    device: Annotated[
        str | None, typer.Option(help="For a bundle: auto, cpu, cuda or cuda:N. [auto]")
    ] = None,
    json_file: Annotated[Path | None, _JSON] = None,
    log_level: Annotated[str, _LEVEL] = "warning",
) -> None:
    """Measure the speed of every mode: tokens/s, also against exits off, latencies, exits, drafts and depth."""
    _log_from(log_level)
    if is_address(target) and device is not None:
        raise UsageError(
            f"--device is {device} and {target} is a server, which has its device; leave --device out."
        )
    file = _json_target(json_file)
    from exeunt.deploy.bench import Load, bench_record, modes_of
    from exeunt.deploy.bench_table import measure, speed_table
    from exeunt.deploy.bench_target import driver

    load = Load(concurrency, prompt_tokens, max_new_tokens, requests or 4 * concurrency)
    with interruptible() as interruption:
        with driver(target, load, device or "auto", interruption) as asked:
            model = asked.model()
            speeds = measure(asked, modes_of(asked.offer()), load)
        _show(speed_table(speeds))
        if file is not None:
            file.write(bench_record(target, model, load, speeds))
