"""The decoder gives transformers' logits and greedy tokens, for every family, dtype and way of cutting the text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from exeunt.compression.decoder import Decoder
from tests.compression.paged_generation import chunked_logits, forced_logits, greedy
from tests.compression.reference_models import build_model, reference_greedy, reference_logits, save

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 6.0, "original_max_position_embeddings": 24}
_YARN_ALL = {
    **_YARN,
    "beta_fast": 8.0,
    "beta_slow": 2.0,
    "mscale": 0.9,
    "mscale_all_dim": 0.4,
    "truncate": False,
}
PROMPT = torch.randint(0, 105, (37,), generator=torch.Generator().manual_seed(1))
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2-untied-scaled-by-depth": (
        "gpt2",
        {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True, "n_inner": None},
    ),
    "gpt2-relu-unscaled": (
        "gpt2",
        {"activation_function": "relu", "scale_attn_weights": False, "n_layer": 3},
    ),
    "llama": ("llama", {}),
    "llama-tied-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads-gelu": ("llama", {"head_dim": 20, "num_key_value_heads": 3, "hidden_act": "gelu"}),
    "llama-one-kv-head": (
        "llama",
        {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 1, "num_hidden_layers": 5},
    ),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 700.0, "factor": 3.0}},
    ),
    "llama-llama3": ("llama", {"rope_parameters": _LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": _YARN}),
    "llama-yarn-every-setting": ("llama", {"rope_parameters": _YARN_ALL}),
    "llama-yarn-attention-factor": ("llama", {"rope_parameters": {**_YARN, "attention_factor": 1.4}}),
    "mistral-window": ("mistral", {"sliding_window": 9}),
    "mistral-whole-context": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window-from-block-2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "qwen2-unused-window": (
        "qwen2",
        {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 0},
    ),
    "qwen2-layer-types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 14}),
    "qwen3-biased-yarn": (
        "qwen3",
        {"attention_bias": True, "head_dim": 10, "tie_word_embeddings": True, "rope_parameters": _YARN},
    ),
}


BFLOAT16 = ("gpt2", "llama", "llama-one-kv-head", "llama-yarn", "mistral-window", "qwen2", "qwen3")
# Random models' bfloat16 logits, below 4, are 1/64 apart or less, and their blocks multiply that by ten; trained ones'
# reach 20 and are 1/8 apart.
MARGIN = 0.25


REAL = ("stories260K", "babyllama-char105", "novels-12x160", "novels-12x160-ee")


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_logits_and_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, changes = CONFIGS[name]
    model = build_model(family, **changes)
    decoder = Decoder.load(save(model, tmp_path), dtype=torch.float32)

    expected = reference_logits(model, PROMPT)
    torch.testing.assert_close(chunked_logits(decoder, PROMPT, [13, 1, 19]), expected, atol=2e-4, rtol=0)
    assert greedy(decoder, PROMPT, 64, chunk=11) == reference_greedy(model, PROMPT, 64)[0]


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_is_as_close_to_float32_as_transformers(name: str, tmp_path: Path) -> None:
    family, changes = CONFIGS[name]
    model = build_model(family, torch.bfloat16, **changes)
    decoder = Decoder.load(save(model, tmp_path))
    assert decoder.dtype == torch.bfloat16
    ours = chunked_logits(decoder, PROMPT, [13, 1, 19])
    theirs = reference_logits(model, PROMPT)
    wanted, margins = reference_greedy(model, PROMPT, 64)
    exact = reference_logits(model.float(), PROMPT)

    assert _rms(ours - exact) < 1.5 * _rms(theirs - exact)
    assert _rms(ours - theirs) < 0.03 * float(exact.std())

    assert _assert_the_same_where_sure(decoder, PROMPT, wanted, margins) >= 32


@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints_continue_as_in_transformers(name: str, shared_models: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared_models / name, dtype=torch.float32).eval()
    decoder = Decoder.load(shared_models / name, dtype=torch.float32)
    assert decoder.spec.parameters == sum(parameter.numel() for parameter in model.parameters())
    prompt = PROMPT % decoder.spec.vocab_size
    torch.testing.assert_close(
        chunked_logits(decoder, prompt, [20]), reference_logits(model, prompt), atol=2e-4, rtol=0
    )
    assert greedy(decoder, prompt, 64, chunk=16) == reference_greedy(model, prompt, 64)[0]


@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints_continue_in_bfloat16_as_in_transformers_where_that_is_sure(
    name: str, shared_models: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared_models / name, dtype=torch.bfloat16).eval()
    decoder = Decoder.load(shared_models / name, dtype=torch.bfloat16)
    start = torch.randint(0, decoder.spec.vocab_size, (3,), generator=torch.Generator().manual_seed(1))
    text, _ = reference_greedy(model, start, 37)  # of its own text a trained model is surer than of noise
    prompt = torch.cat([start, torch.tensor(text)])
    wanted, margins = reference_greedy(model, prompt, 64)
    assert _assert_the_same_where_sure(decoder, prompt, wanted, margins) >= 32


def test_a_window_shorter_than_the_prompt_changes_the_output() -> None:
    """Guards the comparison above: a window that never cut anything off would prove nothing."""
    model = build_model("mistral", sliding_window=9)
    narrow = reference_logits(model, PROMPT)
    wide = reference_logits(build_model("mistral", sliding_window=None), PROMPT)
    assert (narrow - wide).abs().max() > 0.1


def _assert_the_same_where_sure(
    decoder: Decoder, prompt: torch.Tensor, wanted: list[int], margins: list[float]
) -> int:
    """Hold every token of which the reference is sure to it, given those before, and the decoder's own answer up to
    the first of which it is not; the number of tokens of which it is."""
    sure = torch.tensor(margins) > MARGIN
    picked = forced_logits(decoder, prompt, wanted, chunk=11).argmax(-1)
    assert torch.equal(picked[sure], torch.tensor(wanted)[sure])
    first_unsure = len(wanted) if sure.all() else int(sure.long().argmin())
    assert greedy(decoder, prompt, len(wanted), chunk=11)[:first_unsure] == wanted[:first_unsure]
    return int(sure.sum())


def _rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())
