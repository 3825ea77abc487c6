"""Small seeded models of every family, made by transformers itself: what the decoder is compared with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

_MODELS: dict[str, tuple[Any, Any]] = {
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
_GPT2 = {"vocab_size": 131, "n_embd": 48, "n_layer": 4, "n_head": 3, "n_inner": 100, "n_positions": 160}
_SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
}


def build_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A model with random weights, biases and norms, all far from what they are initialised to."""
    config_class, model_class = _MODELS[family]
    sizes = _GPT2 if family == "gpt2" else _SIZES
    special = {"bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(seed)
    model = model_class(config_class(**{**sizes, **special, **changes})).to(torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                centre = 1.0 if "norm" in name or ".ln_" in name else 0.0
                centre = 0.0 if name.endswith("bias") else centre
                parameter.copy_(centre + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 1.3 / parameter.shape[-1] ** 0.5)
    return model.to(dtype)


def save(model: Any, directory: Path, **options: Any) -> Path:
    """The model as a checkpoint directory."""
    model.save_pretrained(directory, **options)
    return directory


def reference_logits(model: Any, token_ids: Tensor) -> Tensor:
    """[tokens, vocab] float32 of one text."""
    with torch.inference_mode():
        logits: Tensor = model(token_ids[None]).logits[0].float()
    return logits


def reference_greedy(model: Any, prompt: Tensor, new_tokens: int) -> tuple[list[int], list[float]]:
    """The greedy continuation and the margin between the two largest logits at each of its tokens."""
    made: list[int] = []
    margins: list[float] = []
    past, ids = None, prompt[None]
    with torch.inference_mode():
        while len(made) < new_tokens:
            out = model(ids, past_key_values=past, use_cache=True)
            past = out.past_key_values
            top = out.logits[0, -1].float().topk(2)
            made.append(int(top.indices[0]))
            margins.append(float(top.values[0] - top.values[1]))
            ids = top.indices[:1][None]
    return made, margins
