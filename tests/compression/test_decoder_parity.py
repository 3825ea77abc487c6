"""The decoder gives transformers' logits and greedy tokens, for every family, dtype and way of cutting the text."""

from pathlib import Path
from typing import Any

import pytest
import torch

from exeunt.compression.decoder import Decoder

from .paged_generation import chunked_logits, greedy
from .reference_models import build_model, reference_greedy, reference_logits, save

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.25}  # logits; their standard deviation is about 1 to 3
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_tokens_are_transformers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family, changes = CONFIGS[name]
    model = build_model(family, dtype, **changes)
    decoder = Decoder.load(save(model, tmp_path), dtype=dtype)
    prompt = torch.randint(0, 131, (37,), generator=torch.Generator().manual_seed(1))

    expected = reference_logits(model, prompt)
    got = chunked_logits(decoder, prompt, [13, 1, 19])
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=0)

    wanted, margins = reference_greedy(model, prompt, 64)
    made = greedy(decoder, prompt, 64, chunk=11)
    unsure = next((i for i, margin in enumerate(margins) if margin < 2 * TOLERANCE[dtype]), len(wanted))
    assert made[:unsure] == wanted[:unsure]
    if dtype == torch.float32:
        assert unsure == len(wanted)
