"""`generate` with a static cache, which transformers compiles on a GPU, on the prompts that the engine is timed with.

Each model is compiled in a process of its own, for as long as the section has time: a compiler cannot be broken off
otherwise. One that does not get through in time is noted, and is no failure of ours.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Final

import torch
import typer

from exeunt.compression.tokenizer import load_tokenizer
from exeunt.deploy.packaged_model import path as checkpoint
from scripts.gpu_check.end_to_end import (
    LARGE_SIZES,
    PACKAGED_SIZES,
    generate_speed,
    packaged_of_transformers,
    prompts_of,
    transformers_model,
    tried,
)
from scripts.gpu_check.models import MISTRAL, TOY
from scripts.gpu_check.report import Clock, Context, Found, Report

ROOT: Final = Path(__file__).resolve().parents[2]
JOBS: Final = (("packaged", 1), (MISTRAL.name, 1), ("packaged", 64))
"""Models and streams at once, the most wanted first."""
_LEAST: Final = 18.0  # seconds left without which none is begun: starting and compiling take the most of them


def run(context: Context, found: Found) -> None:
    """As many of the jobs as there is time for."""
    if not context.cuda:
        found["skipped"] = ["transformers compiles its static cache on a GPU alone"]
        return
    for model, streams in JOBS:
        called = f"transformers generate compiled, {streams} streams"
        if context.fits(_LEAST, f"{model}: {called}", found):
            found.setdefault(model, {})[called] = _apart(context, model, streams)
            context.report.save()


def _apart(context: Context, model: str, streams: int) -> Found:
    """What a process of its own finds, or why it found nothing."""
    path = context.report.path.with_suffix(".compiled.json")
    path.unlink(missing_ok=True)
    seconds = max(1, int(context.clock.left()) - 1)
    said = [sys.executable, "-m", "scripts.gpu_check.compiled", model, str(streams), str(path)]
    said += ["--device", str(context.device), "--seconds", str(seconds)]
    try:
        status = subprocess.run(["timeout", "-k", "3", str(seconds), *said], cwd=ROOT, check=False).returncode
        if not path.exists():
            return {"error": f"not done in {seconds} s (exit status {status})"}
        result: Found = json.loads(path.read_text(encoding="utf-8"))
        return result
    finally:
        path.unlink(missing_ok=True)


def main(
    model: str,
    streams: int,
    out: Path,
    device: str = "cuda",
    seconds: float = 60.0,
    quick: Annotated[bool, typer.Option(help="toy sizes")] = False,
) -> None:
    """Compile and time one model, and write what was found to `out`."""
    context = Context(torch.device(device), quick, Report(out), Clock(seconds))
    sizes = PACKAGED_SIZES if model == "packaged" else LARGE_SIZES
    prompt, answer = (16, 4) if quick else (sizes.prompt, sizes.answer)
    prompts = prompts_of(load_tokenizer(checkpoint()), sizes.most, prompt)[:streams]
    if model == "packaged":
        theirs = packaged_of_transformers(context)
    else:
        theirs = transformers_model(context, TOY if quick else MISTRAL)
    found = tried(lambda: generate_speed(context, theirs, prompts, answer, cache_implementation="static"))
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
