"""The command line: `exeunt calibrate`, `serve`, `eval`, `bench` and `inspect`.

Errors are one line that says what was wrong and what to do, with exit status 2 for wrong usage and 1 for everything
else; `--log-level debug` (or EXEUNT_LOG_LEVEL=debug) adds the traceback. What a command needs is imported by that
command alone, so that `--help` answers at once.
"""

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from exeunt.deploy.arguments import UsageError, block, misused, numbers, one_of, setting, whole
from exeunt.deploy.signals import Interrupted, InterruptibleProgress, end_at_once, interruptible, leave_to
from exeunt.server.settings import setting_help

app = typer.Typer(
    name="exeunt",
    help="An inference server that spends on each token only the computation that token needs.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

USAGE_ERROR: Final = 2
_PIPE_COLUMNS: Final = 180
_BUNDLE = typer.Argument(metavar="BUNDLE", help="A bundle's directory, as `exeunt calibrate --out` wrote it.")


def _count(flag: str, least: int, text: str) -> Any:
    """The option `flag`, a whole number from `least` on."""
    return typer.Option(metavar="N", help=text, parser=whole(flag, least))


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
    try:
        status = app(arguments or ["--help"], prog_name="exeunt", standalone_mode=False)
    except Interrupted as interruption:  # everything is cleaned up: a half-made bundle, temporary files
        words = f"{interruption.word} before it was done; nothing was written"
        return _complain(words, 128 + interruption.number)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except Exception as error:  # noqa: BLE001 - the outermost boundary: a line instead of a traceback
        if _debugging(arguments):
            traceback.print_exc()
        return _complain(*_told(error, arguments))
    return status if isinstance(status, int) else 0


def _told(error: Exception, arguments: Sequence[str]) -> tuple[str, int]:
    """What to say of an error, and the exit status."""
    usage_errors: tuple[type[Exception], ...] = (UsageError,)
    settings_error = sys.modules.get("exeunt.deploy.loading")
    if settings_error is not None:
        usage_errors += (settings_error.SettingsError,)
    parser_error: Any = typer.BadParameter.__mro__[1]  # the usage error of whichever click typer builds on
    if isinstance(error, parser_error):
        return misused(error, arguments), USAGE_ERROR
    if type(error).__name__ == "Abort":
        return "interrupted", 130
    if isinstance(error, usage_errors):
        return str(error), USAGE_ERROR
    if isinstance(error, OSError | ValueError | RuntimeError) or type(error).__module__.startswith("exeunt."):
        return str(error) or type(error).__name__, 1
    return (
        f"{type(error).__name__}: {error} (a bug: run again with EXEUNT_LOG_LEVEL=debug for the traceback)",
        1,
    )


def _complain(message: str, status: int) -> int:
    line = " ".join(message.split())
    print(f"exeunt: {line}", file=sys.stderr)
    return status


def _debugging(arguments: Sequence[str]) -> bool:
    words = " ".join(arguments)
    return (
        "--log-level debug" in words
        or "--log-level=debug" in words
        or os.environ.get("EXEUNT_LOG_LEVEL") == "debug"
    )


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
    log_level: Annotated[str | None, setting("log_level", "LEVEL")] = None,
    log_json: Annotated[
        bool | None, typer.Option("--log-json", help=setting_help("log_json"), show_default=False)
    ] = None,
) -> int:
    """Serve a bundle or a model over HTTP.

    Every option is also an environment variable: --max-num-seqs is EXEUNT_MAX_NUM_SEQS.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    settings = _settings(given)
    from exeunt.deploy.logs import configure_logging
    from exeunt.server.settings import unknown_variables

    configure_logging(settings.log_level, as_json=settings.log_json)
    for name in unknown_variables(os.environ):
        logging.getLogger("exeunt.settings").warning(
            "%s is no setting; `exeunt serve --help` lists what there is.", name
        )
    from exeunt.deploy.serve import bind
    from exeunt.deploy.serve import serve as serve_until_stopped

    with bind(settings.host, settings.port) as sock:
        return serve_until_stopped(settings, sock)


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
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint's directory or a Hugging Face id.")
    ],
    out: Annotated[Path, typer.Option(help="Where the bundle goes.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option(
            help="Text to calibrate on: a file (txt or JSONL), a folder, or hf:NAME. [the packaged model's own]"
        ),
    ] = None,
    tokens: Annotated[int, _count("--tokens", 1, "Use so many tokens of it.")] = 48_000,
    exits: Annotated[
        str, typer.Option(help="`auto`, or the blocks that certified exits follow, e.g. 3,8.")
    ] = "auto",
    drafting_exit: Annotated[
        str,
        typer.Option(help="`auto`, `none`, or the block that the exit follows which drafts when verified."),
    ] = "auto",
    linear_block: Annotated[str, typer.Option(help="`auto`, `none`, or the block to replace.")] = "auto",
    weights: Annotated[
        str, typer.Option(help="both, or int4 or full alone: what the bundle holds, and can be asked for.")
    ] = "both",
    kv: Annotated[str, typer.Option(help="int4 adds the INT4 KV cache, full does not.")] = "int4",
    risk: Annotated[
        str, typer.Option(help="Disagreement targets of approximate exits.")
    ] = "0.01,0.02,0.05,0.1",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[
        int,
        _count(
            "--seed",
            0,
            "Same seed, same bundle, if `--exits` names exits and `--drafting-exit` is none: which pay is measured.",
        ),
    ] = 0,
) -> None:
    """Make a bundle from a model: INT4 weights, a linear block, exits with certified thresholds."""
    from exeunt.calibration.errors import CalibrationError
    from exeunt.calibration.options import CalibrationOptions
    from exeunt.calibration.pipeline import calibrate as make_bundle
    from exeunt.calibration.progress import TerminalProgress
    from exeunt.deploy.loading import find_folder, resolve_device

    resolve_device(device)
    find_folder(model)
    try:
        options = CalibrationOptions(
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
            data=_calibration_data(model, data),
        )
    except CalibrationError as error:
        raise UsageError(str(error)) from error
    with interruptible() as interruption:
        path = make_bundle(options, InterruptibleProgress(TerminalProgress(), interruption))
        print(f"{path} is ready: exeunt inspect {path}; exeunt serve {path}")


def _calibration_data(model: str, data: str | None) -> str:
    """The text to calibrate on; the packaged one is the packaged model's own and certifies nothing about another."""
    if data is not None:
        return data
    from exeunt.deploy import packaged_model
    from exeunt.deploy.packaged import CALIBRATION_TEXT

    folder = packaged_model.path()
    if Path(model).resolve() != folder.resolve():
        raise UsageError(
            f"Give --data: a text of the kind that {model} will serve (a file, a folder, hf:NAME)."
        )
    return str(folder / CALIBRATION_TEXT)


@app.command()
def inspect(
    bundle: Annotated[Path, _BUNDLE],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write it as JSON to this file.")
    ] = None,
) -> None:
    """Show what is inside a bundle, its sizes, how it was made, and its risk table."""
    from exeunt.compression.bundle import open_bundle
    from exeunt.deploy.inspect import describe, render

    opened = open_bundle(bundle)
    _show(render(opened))
    _write_json(json_file, describe(opened))


def _show(table: Any) -> None:
    """Print a table: as wide as the terminal, and as wide as it wants where it goes to a file or a pipe."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=_PIPE_COLUMNS)).print(table)


def _write_json(path: Path | None, content: object) -> None:
    if path is not None:
        path.write_text(
            json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8"
        )


@app.command(name="eval")
def evaluate(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle or a checkpoint's directory.")],
    data: Annotated[
        str, typer.Option(help="Text: a file (txt or JSONL), a folder, or hf:NAME.", show_default=False)
    ],
    tokens: Annotated[int, _count("--tokens", 16, "Use so many tokens of it.")] = 16_000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    speed: Annotated[bool, typer.Option(help="Also measure every mode's tokens/s.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write it as JSON to this file.")
    ] = None,
) -> None:
    """Measure perplexity, KL, agreement, depth and speed of every mode on a text."""
    from exeunt.deploy.evaluation import evaluate_and_time, evaluation_table

    with interruptible():
        model = _load(bundle, device)
        evaluated = evaluate_and_time(model, data, tokens=tokens, speed=speed)
        _show(evaluation_table(evaluated))
        _write_json(json_file, evaluated.record(model.name))


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
    device: Annotated[str, typer.Option(help="For a bundle: auto, cpu, cuda or cuda:N.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write it as JSON to this file.")
    ] = None,
) -> None:
    """Measure the speed of every mode: tokens/s, also against exits off, latencies, exits, drafts and depth."""
    from exeunt.deploy.bench import Load, bench_record, modes_of
    from exeunt.deploy.bench_table import measure, speed_table

    load = Load(concurrency, prompt_tokens, max_new_tokens, requests or 4 * concurrency)
    import_module("exeunt.deploy.bench_http" if _is_address(target) else "exeunt.deploy.bench_engine")
    with interruptible():
        with _driver(target, load, device) as driver:
            model = driver.model()
            speeds = measure(driver, modes_of(driver.offer()), load)
        _show(speed_table(speeds))
        _write_json(json_file, bench_record(target, model, load, speeds))


def _is_address(target: str) -> bool:
    return target.startswith(("http://", "https://"))


@contextmanager
def _driver(target: str, load: Any, device: str) -> Iterator[Any]:
    if _is_address(target):
        from exeunt.deploy.bench_http import HTTPDriver

        driver: Any = HTTPDriver(target, concurrency=load.concurrency)
    else:
        from exeunt.deploy.bench_engine import engine_driver

        driver = engine_driver(_load(target, device), load)
    try:
        yield driver
    finally:
        driver.close()


def _load(name: str, device: str) -> Any:
    """A bundle or plain model, loaded for measuring: a server's environment variables have no part in it."""
    from exeunt.deploy.loading import find_source, load_model, resolve_device
    from exeunt.server.settings import given_settings

    resolve_device(device)
    return load_model(find_source(name), given_settings({"device": device}))
