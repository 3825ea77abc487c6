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
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from exeunt.deploy.arguments import UsageError, is_address, setting
from exeunt.deploy.calibrate_command import calibrate
from exeunt.deploy.cli_options import (
    BUNDLE,
    JSON,
    LEVEL,
    SERVER_LEVEL,
    Wishes,
    count,
    json_target,
    log_from,
    show,
    verifying,
)
from exeunt.deploy.eval_command import evaluate
from exeunt.deploy.failures import told
from exeunt.deploy.signals import Interrupted, end_at_once, interruptible, leave_to
from exeunt.server.settings import setting_help

app = typer.Typer(
    name="exeunt",
    help="An inference server that spends on each token only the computation that token needs.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
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
    wishes = Wishes()
    try:
        status = app(arguments or ["--help"], prog_name="exeunt", standalone_mode=False, obj=wishes)
    except Interrupted as interruption:  # everything is cleaned up: a half-made bundle, temporary files
        return _complain(interruption.told, 128 + interruption.number)
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


@app.command(short_help="Serve a bundle or a model over HTTP.")
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="BUNDLE|MODEL",
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
    enforce_eager: Annotated[
        bool | None,
        typer.Option("--enforce-eager", help=setting_help("enforce_eager"), show_default=False),
    ] = None,
    async_scheduling: Annotated[
        bool | None,
        typer.Option(
            "--async-scheduling/--no-async-scheduling",
            help=setting_help("async_scheduling"),
            show_default=False,
        ),
    ] = None,
    tuning_seconds: Annotated[str | None, setting("tuning_seconds", "SECONDS")] = None,
    scheduling: Annotated[str | None, setting("scheduling", "POLICY")] = None,
    longest_wait: Annotated[str | None, setting("longest_wait", "SECONDS")] = None,
    request_timeout: Annotated[str | None, setting("request_timeout", "SECONDS")] = None,
    shutdown_timeout: Annotated[str | None, setting("shutdown_timeout", "SECONDS")] = None,
    max_body_bytes: Annotated[str | None, setting("max_body_bytes", "BYTES")] = None,
    allowed_origins: Annotated[str | None, setting("allowed_origins", "LIST")] = None,
    log_level: Annotated[str | None, SERVER_LEVEL] = None,
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
    from exeunt.server.settings import nearest_variable, unknown_variables

    configure_logging(settings.log_level, as_json=settings.log_json)
    for name in unknown_variables(os.environ):
        logging.getLogger("exeunt.settings").warning(
            "%s is no setting%s; `exeunt serve --help` lists what there is.", name, nearest_variable(name)
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
        raise UsageError(invalid_setting(error, given)) from error


@app.command(short_help="Show what is inside a bundle.")
def inspect(
    bundle: Annotated[Path, BUNDLE],
    json_file: Annotated[Path | None, JSON] = None,
    log_level: Annotated[str, LEVEL] = "warning",
) -> None:
    """Show what is inside a bundle, its sizes, how it was made, and its risk table."""
    log_from(log_level)
    target = json_target(json_file, model=bundle)
    from exeunt.compression.bundle import open_bundle
    from exeunt.deploy.inspect import describe, render

    _check_bundle(bundle)
    with verifying():
        opened = open_bundle(bundle)
    show(render(opened))
    if target is not None:
        target.write(describe(opened))


def _check_bundle(path: Path) -> None:
    """Raise UsageError or SettingsError where there is no bundle at `path`, intact or not."""
    from exeunt.deploy.loading import find_source

    if not path.exists():
        raise UsageError(f"{path} does not exist; give the folder that `exeunt calibrate --out` wrote.")
    if not find_source(str(path)).is_bundle:
        raise UsageError(f"{path} is a checkpoint; give the folder that `exeunt calibrate --out` wrote.")


app.command(short_help="Make a bundle from a model.")(calibrate)
app.command(name="eval", short_help="Measure the quality of every mode.")(evaluate)


@app.command(short_help="Measure the speed of every mode.")
def bench(
    target: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE|URL", help="A bundle (measured in process) or a server's http:// address."
        ),
    ],
    concurrency: Annotated[int, count("--concurrency", 1, "Requests under way at once.")] = 8,
    prompt_tokens: Annotated[int, count("--prompt-tokens", 1, "Length of every prompt.")] = 64,
    max_new_tokens: Annotated[int, count("--max-new-tokens", 2, "Length of every answer.")] = 64,
    requests: Annotated[int | None, count("--requests", 1, "Requests per mode. [4 × concurrency]")] = None,
    device: Annotated[
        str | None, typer.Option(help="For a bundle: auto, cpu, cuda or cuda:N. [auto]")
    ] = None,
    json_file: Annotated[Path | None, JSON] = None,
    log_level: Annotated[str, LEVEL] = "warning",
) -> None:
    """Measure the speed of every mode: tokens/s, also against exits off, latencies, exits, drafts and depth."""
    log_from(log_level)
    if is_address(target) and device is not None:
        raise UsageError(
            f"--device is {device} and {target} is a server, which has its device; leave --device out."
        )
    file = json_target(json_file, model=target)
    from exeunt.deploy.bench import bench_record, modes_of
    from exeunt.deploy.bench_load import Load
    from exeunt.deploy.bench_table import measure, speed_table
    from exeunt.deploy.bench_target import driver

    load = Load(concurrency, prompt_tokens, max_new_tokens, requests or 4 * concurrency)
    with interruptible() as interruption:
        with driver(target, load, device or "auto", interruption) as asked:
            model = asked.model()
            speeds = measure(asked, modes_of(asked.offer()), load)
        show(speed_table(speeds))
        if file is not None:
            file.write(bench_record(target, model, load, speeds))
