"""Evaluation where full weights are read as they are run: the same figures, from batches as wide as asked for."""

from pathlib import Path

import pytest
import torch

import exeunt.compression.streamed_blocks
from exeunt.calibration import evaluation
from exeunt.calibration.evaluation import Mode, evaluate_modes
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.calibration.token_figures import TokenFigures, figures_of, reference_of
from exeunt.compression.block import Block
from exeunt.compression.block_weights import read_block
from exeunt.compression.checkpoint import open_checkpoint
from exeunt.compression.decoder import Decoder
from exeunt.compression.variant import Variant
from exeunt.kernels.native.library import native_library
from tests.calibration.conftest import BLOCKS, HIDDEN, VOCAB, random_exit

FULL, SMALL_KV = Variant("full", "full", False), Variant("full", "int4", False)
ROWS = [torch.randint(0, VOCAB, (48,), generator=torch.Generator().manual_seed(row)) for row in range(12)]
MODES = [
    Mode(FULL),
    Mode(SMALL_KV),
    Mode(SMALL_KV, 0.3),
    Mode(SMALL_KV, 0.3, skipped_kv="backfill"),
]


def models_of(checkpoint: Path, streamed: bool) -> dict[Variant, ForcedModel]:
    opened = open_checkpoint(checkpoint)
    decoder = Decoder.from_weights(opened.spec, opened.weights(), dtype=torch.float32, streamed=streamed)
    exits = [random_exit(0, 3), random_exit(2, 4)]
    return {variant: ForcedModel(decoder, variant.kv_cache, exits) for variant in (FULL, SMALL_KV)}


@pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)
def test_streamed_weights_are_evaluated_in_wide_batches_to_the_same_figures(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_DISTRIBUTIONS", 256 * VOCAB)  # for a batch of 256 tokens
    tokens = sum(map(len, ROWS))
    read: list[int] = []

    def counted(*args: object, **options: object) -> Block:
        read.append(args[1])  # type: ignore[arg-type]
        return read_block(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(exeunt.compression.streamed_blocks, "read_block", counted)
    tables = [
        evaluate_modes(MODES, models_of(checkpoint, streamed), ROWS, text="", batch_tokens=tokens, seed=1)
        for streamed in (False, True)
    ]
    for one, other in zip(*(table.results for table in tables), strict=True):
        assert one.perplexity.value == pytest.approx(other.perplexity.value, rel=1e-12)
        assert one.kl.value == pytest.approx(other.kl.value, rel=1e-9, abs=1e-12)
        assert one.agreement == other.agreement
        assert one.by_exit == other.by_exit
        assert one.exit_rate == other.exit_rate
    assert 0 < sum(tables[1].results[2].by_exit) < tokens
    # one batch of all tokens: two variants at full depth, and what lies behind the first exit run and projected to
    assert len(read) <= 2 * BLOCKS + 2 * (BLOCKS - 1)


def test_distributions_made_anew_are_those_that_would_have_been_kept() -> None:
    seed = torch.Generator().manual_seed(2)
    matrix, final = torch.randn(VOCAB, HIDDEN, generator=seed), torch.randn(90, HIDDEN, generator=seed)
    other = final + 0.3 * torch.randn(90, HIDDEN, generator=seed)
    scored = torch.rand(90, generator=seed) < 0.7
    targets = torch.randint(-1, VOCAB, (90,), generator=seed)

    def head(states: torch.Tensor) -> torch.Tensor:
        return states @ matrix.T

    tokens = scored.nonzero().squeeze(1)
    found: list[TokenFigures] = []
    for keep in (True, False):
        reference = reference_of(head, final, scored, VOCAB, keep=keep)
        assert (reference.kept is None) != keep
        found.append(figures_of(head, other, tokens, targets, reference))
    torch.testing.assert_close(found[0].kl, found[1].kl, atol=1e-6, rtol=1e-5)
    p, q = head(final).log_softmax(-1), head(other).log_softmax(-1)
    kl = torch.where(scored, (p.exp() * (p - q)).sum(-1), 0.0)
    torch.testing.assert_close(found[1].kl, kl, atol=1e-5, rtol=1e-4)
