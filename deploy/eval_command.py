"""`exeunt eval`: its words on the command line."""

from pathlib import Path
from typing import Annotated

import typer

from exeunt.deploy.cli_options import DEVICE, JSON, LEVEL, count, json_target, log_from, show
from exeunt.deploy.signals import InterruptibleProgress, interruptible

_EVALUATION_TOKENS = count(
    "--tokens",
    16,
    "Use so many tokens of it: whole documents in an order drawn from --seed, of a single document the beginning.",
)
_WINDOW = count(
    "--window", 16, "Tokens that are read at a time; 512, or the model's context where that is shorter."
)
_STRIDE = count(
    "--stride",
    1,
    "Let windows overlap: each is so many tokens behind the one before, and counts its last so many.",
)
_GENERATE = typer.Option("--generate", help="Also let every mode write, and have the full model read it.")
_EVALUATION_SEED = count("--seed", 0, "Seed of the documents' order and of the intervals.")


def evaluate(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle or a checkpoint's directory.")],
    data: Annotated[
        str,
        typer.Option(
            help="Text: a file (txt or JSONL), a folder, or hf:NAME[[:CONFIG]:SPLIT].", show_default=False
        ),
    ],
    tokens: Annotated[int, _EVALUATION_TOKENS] = 16_000,
    seed: Annotated[int, _EVALUATION_SEED] = 0,
    window: Annotated[int | None, _WINDOW] = None,
    stride: Annotated[int | None, _STRIDE] = None,
    generate: Annotated[bool, _GENERATE] = False,
    device: Annotated[str, DEVICE] = "auto",
    speed: Annotated[bool, typer.Option(help="Also measure every mode's tokens/s.")] = True,
    json_file: Annotated[Path | None, JSON] = None,
    log_level: Annotated[str, LEVEL] = "warning",
) -> None:
    """Measure perplexity, KL, agreement, depth and speed of every mode on a text."""
    log_from(log_level)
    target = json_target(json_file, model=bundle, data=data)
    from exeunt.calibration.documents import check_there
    from exeunt.calibration.evaluate import EvaluationOptions
    from exeunt.calibration.option_limits import check_names
    from exeunt.calibration.progress import watched_progress
    from exeunt.deploy.evaluation import evaluate_and_time, show_evaluation
    from exeunt.deploy.loading import find_folder
    from exeunt.deploy.preparation import load_to_measure

    check_names({"BUNDLE": bundle, "--data": data})
    options = EvaluationOptions(tokens=tokens, window=window, stride=stride, seed=seed, generate=generate)
    if (folder := find_folder(bundle)) is not None:
        options.check_for(folder)
        check_there(data)  # before a model is loaded for nothing

    with interruptible() as interruption:
        model = load_to_measure(bundle, device, InterruptibleProgress(watched_progress(), interruption))
        evaluated = evaluate_and_time(model, data, options, speed=speed)
        show_evaluation(evaluated, show)
        if target is not None:
            target.write(evaluated.record(model.name))
