"""Writes a stage's weights and the tokenizer as a Hugging Face folder in bfloat16."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM

from scripts.packaged_model.checkpoint import load_checkpoint
from scripts.packaged_model.decoder import build_model
from scripts.packaged_model.recipe import Recipe, Stage
from scripts.packaged_model.tokenizer import load_tokenizer


def stage_model(run: Path, recipe: Recipe, stage: Stage) -> LlamaForCausalLM:
    """Return a stage's model with its weights rounded to bfloat16 and held in fp32: what an export computes with."""
    model = build_model(recipe)
    model.load_state_dict(load_checkpoint(run / f"{stage}.pt", recipe, torch.device("cpu")).model)
    return model.bfloat16().float().eval()


def export(run: Path, recipe: Recipe, stage: Stage, folder: Path) -> None:
    """Write ``config.json``, ``generation_config.json``, ``model.safetensors`` and the tokenizer into a folder."""
    model: Any = stage_model(run, recipe, stage).bfloat16()
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    load_tokenizer(run / "tokenizer").save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for local in ("backend", "is_local", "local_files_only"):
        settings.pop(local, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every release knows
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
