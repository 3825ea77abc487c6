"""Measures a model on held-out text: perplexity, and how often each depth agrees with the full depth."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from scripts.packaged_model.checkpoint import load_checkpoint
from scripts.packaged_model.decoder import Decoder
from scripts.packaged_model.export import stage_model
from scripts.packaged_model.recipe import Recipe, Stage, total_steps
from scripts.packaged_model.tokens import SOURCES, held_out_rows


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one model does on one source: ``perplexity[i]`` and ``agreement[i]`` belong to the depth after block i+1.

    Perplexities are per token, through the shared final norm and head, teacher-forced in windows of the whole
    context, each scored without what came before it. ``agreement`` is the share of tokens at which the depth's first
    choice is that of the full depth.
    """

    tokens: int
    perplexity: list[float]
    agreement: list[float]


@torch.no_grad()
def measure(model: LlamaForCausalLM, rows: torch.Tensor) -> Measurement:
    """Return the measurement of a model on windows [rows, length + 1]."""
    decoder = Decoder(model)
    blocks = len(model.model.layers)
    losses, agreements = [0.0] * blocks, [0] * blocks
    for row in torch.split(rows, 4):
        states = decoder.states(row[:, :-1])[1:]
        full = decoder.logits(states[-1]).argmax(-1)
        for index, state in enumerate(states):
            logits = decoder.logits(state)
            losses[index] += float(
                functional.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten(), reduction="sum")
            )
            agreements[index] += int((logits.argmax(-1) == full).sum())
    count = rows.shape[0] * (rows.shape[1] - 1)
    return Measurement(
        count, [math.exp(loss / count) for loss in losses], [hits / count for hits in agreements]
    )


def measure_stage(run: Path, recipe: Recipe, stage: Stage, windows: int) -> dict[str, Any]:
    """Return a stage's measurements on both sources, and what its training took, as plain values."""
    saved = load_checkpoint(run / f"{stage}.pt", recipe, torch.device("cpu"))
    model = stage_model(run, recipe, stage)
    held_out = {
        length: {
            source: asdict(
                measure(model, held_out_rows(run, source, length, windows * recipe.context // length))
            )
            for source in SOURCES
        }
        for length in (recipe.context, recipe.context // recipe.trunk_split)
    }
    trunk = saved.first if stage != "trunk" else saved.step
    return {
        "stage": stage,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trunk_steps": trunk,
        "branch_steps": saved.step - trunk,
        "branch_steps_planned": saved.steps if stage != "trunk" else 0,
        "finished": saved.step - saved.first == total_steps(recipe, stage, saved.steps),
        "trunk_minutes": (saved.trunk_seconds if stage != "trunk" else saved.seconds) / 60,
        "branch_minutes": saved.seconds / 60 if stage != "trunk" else 0.0,
        "tokens_seen": saved.step * recipe.windows * recipe.context,
        "held_out": held_out[recipe.context],
        "held_out_short": held_out[recipe.context // recipe.trunk_split],
    }
