"""The decoder gives transformers' logits and greedy tokens, for every family, dtype and way of cutting the text."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from exeunt.compression.decoder import Decoder
from tests.compression.family_configs import CONFIGS
from tests.compression.paged_generation import chunked_logits, forced_logits, greedy
from tests.compression.reference_models import build_model, reference_greedy, reference_logits, save

PROMPT = torch.randint(0, 105, (37,), generator=torch.Generator().manual_seed(1))

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
