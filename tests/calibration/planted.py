"""What is planted for estimators to find: a map from correlated inputs to outputs, and an affine block in a model."""

from pathlib import Path

import torch
from torch import Tensor

from exeunt.calibration.activations import Scratch
from exeunt.calibration.block_fit import Moments
from exeunt.calibration.block_fitter import BlockFitter
from exeunt.calibration.ranked_map import parameters_of
from exeunt.calibration.sequence_batch import batches
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.compression.decoder import Decoder
from exeunt.compression.linear_block import LinearBlock
from tests.calibration.conftest import HIDDEN, VOCAB

H = 12


def data(
    tokens: int, seed: int = 0, noise: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Correlated inputs, planted outputs, and the planted weight and bias."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(H, H, generator=g, dtype=torch.float64)
    x = torch.randn(tokens, H, generator=g, dtype=torch.float64) @ mix + 3.0
    planted = torch.Generator().manual_seed(99)
    weight = torch.randn(H, H, generator=planted, dtype=torch.float64)
    bias = torch.randn(H, generator=planted, dtype=torch.float64)
    return (
        x,
        x @ weight.T + bias + noise * torch.randn(tokens, H, generator=g, dtype=torch.float64),
        weight,
        bias,
    )


def moments(x: torch.Tensor, y: torch.Tensor) -> Moments:
    """In uneven pieces, as activations arrive."""
    total = Moments.zeros(H, H)
    for start, stop in ((0, 7), (7, 100), (100, len(x))):
        total.add(x[start:stop], y[start:stop])
    return total


RANK = 3
PLANTED = 1


def planted_block() -> LinearBlock:
    g = torch.Generator().manual_seed(4)
    up, down = torch.randn(HIDDEN, RANK, generator=g) * 0.3, torch.randn(RANK, HIDDEN, generator=g) * 0.3
    return LinearBlock(PLANTED, down, up, torch.randn(HIDDEN, generator=g) * 0.1)


def text(rows: int, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (64,), generator=g) for _ in range(rows)]


@torch.inference_mode()
def spoken(model: ForcedModel, rows: int, seed: int) -> list[Tensor]:
    """Texts that the model itself would write: whatever departs from it costs."""
    g = torch.Generator().manual_seed(seed)
    texts = torch.randint(VOCAB, (rows, 1), generator=g)
    for _ in range(63):
        (batch,) = batches(list(texts), 100_000)
        chances = model.decoder.head(model.full_depth(batch)[1]).softmax(-1).view(rows, -1, VOCAB)[:, -1]
        texts = torch.cat([texts, torch.multinomial(chances, 1, generator=g)], 1)
    return list(texts)


def with_planted(decoder: Decoder) -> ForcedModel:
    """A model whose block 1 is an affine map of rank 3."""
    return ForcedModel(decoder.with_linear_block(planted_block()), "full", ())


def fitted(model: ForcedModel, folder: Path) -> BlockFitter:
    fit, select = text(20, 1), text(6, 2)
    scratch = Scratch(folder)
    visitor = BlockFitter(
        HIDDEN, parameters_of(RANK, HIDDEN), 20 * 64, torch.device("cpu"), scratch, reduction=1.0
    )
    groups = list(batches([*fit, *select], 500))
    states = [model.decoder.embed(group.token_ids, group.positions) for group in groups]
    starts = [0, *torch.tensor([group.tokens for group in groups]).cumsum(0).tolist()]
    for block in range(model.blocks):
        for number, group in enumerate(groups):
            geometry, pages = group.geometry(model.layout.page_tokens), model.pages(group)
            behind = model.decoder.run_blocks(states[number], geometry, pages, block, block + 1)
            visitor.see(block, slice(starts[number], starts[number + 1]), states[number], behind)
            states[number] = behind
        visitor.finish(block)
    return visitor
