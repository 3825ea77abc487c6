"""Holds the packaged model on a GPU to `transformers` there: tokens, then speed; JSON. `make gpu-check` calls it.

`--device cpu` runs the same on a CPU, to try the script itself.
"""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from exeunt.compression.model import LoadedModel, load_plain_model
from exeunt.deploy.bench import Load, machine
from exeunt.deploy.bench_engine import EngineDriver, engine_driver
from exeunt.deploy.packaged_model import path as checkpoint
from scripts.bench_runs import OFF, RESULTS

TOKENS = 64
STREAMS = (1, 8, 64)
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 0.25}
"""How far below its largest logit `transformers` may see our token: sums go in another order, bfloat16 rounds."""


def main(device: str = "cuda", out: Annotated[Path | None, typer.Option()] = None) -> None:
    """Check, measure, write JSON; exit status 1 where a token is not what it may be."""
    place = torch.device(device)
    record: dict[str, Any] = {"machine": machine(), "device": _named(place), "checks": {}, "tokens_per_s": {}}
    good = True
    for dtype, tolerance in TOLERANCES.items():
        name = str(dtype).removeprefix("torch.")
        reference = _reference(place, dtype)
        model = load_plain_model(checkpoint(), device=place, dtype=dtype)
        driver = engine_driver(model, Load(max(STREAMS), 64, TOKENS, max(STREAMS), temperature=0.0))
        try:
            check = _check(model, driver, reference, tolerance)
            record["checks"][name] = check
            good &= check["agrees"]
            record["tokens_per_s"][name] = _speeds(driver, reference)
        finally:
            driver.close()
    target = out or RESULTS / "gpu-check.json"
    target.write_text(json.dumps(record, indent=2) + "\n")
    typer.echo(json.dumps(record, indent=2))
    sys.exit(0 if good else 1)


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _reference(device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=dtype).to(device).eval()


@torch.inference_mode()
def _check(model: LoadedModel, driver: EngineDriver, reference: Any, tolerance: float) -> dict[str, Any]:
    """Our greedy answer scored by `transformers`: every token must be its own choice, or within `tolerance` of it."""
    prompt = driver.prompts(1, 64)[0]
    ours = driver.run([prompt], {"early_exit": OFF}, Load(1, 64, TOKENS, 1, temperature=0.0))[0].ids
    text = torch.tensor([[*prompt, *ours]], device=model.device)
    logits = reference(text).logits[0, len(prompt) - 1 : -1].float()
    behind = logits.max(-1).values - logits.gather(1, text[0, len(prompt) :, None])[:, 0]
    worst = float(behind.max())
    return {
        "tokens": len(ours),
        "chosen_alike": int((behind == 0).sum()),
        "worst_margin": worst,
        "tolerance": tolerance,
        "agrees": len(ours) == TOKENS and worst <= tolerance,
    }


@torch.inference_mode()
def _speeds(driver: EngineDriver, reference: Any) -> dict[str, float]:
    """Tokens per second of the engine by streams, and of one `generate`."""
    speeds = {}
    for streams in STREAMS:
        load = Load(streams, 64, TOKENS, streams, temperature=0.0)
        prompts = driver.prompts(streams, 64)
        driver.run(prompts, {"early_exit": OFF}, load)
        began = time.perf_counter()
        driver.run(prompts, {"early_exit": OFF}, load)
        speeds[f"{streams} stream{'s' if streams > 1 else ''}"] = (
            streams * TOKENS / (time.perf_counter() - began)
        )
    ids = torch.tensor([driver.prompts(1, 64)[0]], device=reference.device)
    for _ in range(2):
        began = time.perf_counter()
        reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        if ids.is_cuda:
            torch.cuda.synchronize()
        speeds["generate"] = TOKENS / (time.perf_counter() - began)
    return speeds


if __name__ == "__main__":
    typer.run(main)
