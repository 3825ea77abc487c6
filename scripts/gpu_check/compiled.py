"""`generate` with a static cache, which transformers compiles on a GPU, on the prompts that the engine is timed with.

Each model is compiled in a process of its own, for as long as the section has time: a compiler cannot be broken off
otherwise. One that does not get through in time is noted, and is no failure of ours.
"""

import json
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from scripts.gpu_check.models import LLAMA, MISTRAL, TOY
from scripts.gpu_check.prompts import packaged_prompts, shifted_prompts
from scripts.gpu_check.report import Clock, Context, Found, Report
from scripts.gpu_check.room import has_room, weight_bytes
from scripts.gpu_check.sizes import LARGE_SIZES, PACKAGED_SIZES, Sizes
from scripts.gpu_check.transformers_speeds import (
    generate_speed,
    packaged_of_transformers,
    transformers_model,
    tried,
)

_BESIDE: Final = 3e9  # bytes beside the weights: the cache of keys and values, a CUDA context, graphs
ROOT: Final = Path(__file__).resolve().parents[2]
JOBS: Final = (("packaged", 1), (MISTRAL.name, 1), ("packaged", 64))
"""Models and streams at once, the most wanted first."""
LEAST: Final = (
    30.0  # seconds left without which none is begun: imports, load, a cold compile and a second run
)


def run(context: Context, found: Found) -> None:
    """As many of the jobs as there is time for."""
    if not context.cuda:
        found["skipped"] = ["transformers compiles its static cache on a GPU alone"]
        return
    for model, streams in JOBS:
        called = f"transformers generate compiled, {streams} streams"
        weights = weight_bytes(MISTRAL.spec(), "full") if model == MISTRAL.name else 0.0
        if context.fits(LEAST, f"{model}: {called}", found) and has_room(
            context, weights + _BESIDE, f"{model}: {called}", found
        ):
            found.setdefault(model, {})[called] = compiled_apart(context, model, streams)
            context.report.save()


def compiled_apart(context: Context, model: str, streams: int, sizes: Sizes | None = None) -> Found:
    """What a process of its own finds, or why it found nothing; `sizes` None: those that the engine is timed with."""
    path = context.report.path.with_suffix(".compiled.json")
    path.unlink(missing_ok=True)
    seconds = max(1, int(context.clock.left()) - 1)
    said = [sys.executable, "-m", "scripts.gpu_check.compiled", model, str(streams), str(path)]
    said += ["--device", str(context.device), "--seconds", str(seconds)]
    if sizes is not None:
        said += ["--prompt", str(sizes.prompt), "--answer", str(sizes.answer)]
    try:
        status = subprocess.run(["timeout", "-k", "3", str(seconds), *said], cwd=ROOT, check=False).returncode
        if not path.exists():
            return {"error": f"not done in {seconds} s (exit status {status})"}
        result: Found = json.loads(path.read_text(encoding="utf-8"))
        return result
    finally:
        path.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile and time one model, and write what was found."""
    parser = ArgumentParser(prog="python -m scripts.gpu_check.compiled", description=main.__doc__)
    parser.add_argument("model", choices=("packaged", MISTRAL.name, LLAMA.name))
    parser.add_argument("streams", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--prompt", type=int, help="tokens, else as many as the engine is timed with")
    parser.add_argument("--answer", type=int, help="likewise")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    asked = parser.parse_args(arguments)
    context = Context(torch.device(asked.device), asked.quick, Report(asked.out), Clock(asked.seconds))
    sizes = PACKAGED_SIZES if asked.model == "packaged" else LARGE_SIZES
    own = (16, 4) if asked.quick else (sizes.prompt, sizes.answer)
    prompt, answer = asked.prompt or own[0], asked.answer or own[1]
    prompts = shifted_prompts(asked.streams, prompt) if asked.prompt else packaged_prompts(sizes.most, prompt)
    if asked.model == "packaged":
        theirs = packaged_of_transformers(context)
    else:
        shape = next(each for each in (MISTRAL, LLAMA) if each.name == asked.model)
        theirs = transformers_model(context, TOY if asked.quick else shape)
    streams = prompts[: asked.streams]
    found = tried(lambda: generate_speed(context, theirs, streams, answer, cache_implementation="static"))
    asked.out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
