"""Gathers the measured numbers behind the model card into one record."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.packaged_model.export import stage_model
from scripts.packaged_model.measure import measure_stage
from scripts.packaged_model.recipe import Recipe
from scripts.packaged_model.sampler import Sampler
from scripts.packaged_model.tokenizer import load_tokenizer
from scripts.packaged_model.tokens import SOURCES

PROMPTS = ("", "Once upon a time, there was a little", "The old man looked at the sea and")


def samples(run: Path, recipe: Recipe, temperature: float, seed: int, length: int = 160) -> dict[str, Any]:
    """Return unedited samples of the exits branch for each of ``PROMPTS``, up to where a document ends."""
    tokenizer = load_tokenizer(run / "tokenizer")
    sampler = Sampler(stage_model(run, recipe, "exits"))
    texts = []
    for prompt in PROMPTS:
        start = torch.tensor([tokenizer(prompt).input_ids])
        row = sampler.rows(start, min(recipe.context, start.shape[1] + length), temperature, seed)[0].tolist()
        end = row.index(0, start.shape[1]) if 0 in row[start.shape[1] :] else len(row)
        texts.append({"prompt": prompt, "text": tokenizer.decode(row[1:end]).strip()})
    return {"temperature": temperature, "seed": seed, "texts": texts}


def gather(
    run: Path,
    recipe: Recipe,
    *,
    windows: int,
    calibration: dict[str, int],
    hardware: str,
    remark: str,
    commands: list[str],
) -> dict[str, Any]:
    """Return everything the model card says, measured now on the checkpoints of a run's folder."""
    return {
        "recipe": recipe.to_json(),
        "train_tokens": {
            source: len(np.load(run / f"{source}.train.npy", mmap_mode="r")) for source in SOURCES
        },
        "exits": measure_stage(run, recipe, "exits", windows),
        "plain": measure_stage(run, recipe, "plain", windows),
        "calibration": calibration,
        "samples": samples(run, recipe, temperature=0.8, seed=1),
        "hardware": hardware,
        "remark": remark,
        "commands": commands,
    }


def write_facts(facts: dict[str, Any], path: Path) -> None:
    """Write the record as JSON, numbers rounded to six significant digits."""
    path.write_text(json.dumps(_rounded(facts), indent=1) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return value
