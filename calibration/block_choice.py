"""Which block a linear map replaces: R² of all blocks, then the measured perplexity of the best few candidates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.calibration.block_fit import Moments, choose_ridge, linear_block, rank_within
from exeunt.calibration.sequence_batch import SequenceBatch, batches
from exeunt.calibration.teacher_forcing import LOGITS_AT_ONCE, ForcedModel
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.variant import KVFormat

REDUCTION: Final = 34.0
"""A linear block holds at most one parameter for so many of the block it replaces (arXiv 2604.20682, block 31)."""
CANDIDATES: Final = 3

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class BlockFit:
    """How well an affine map stands in for one block, R² measured on the select split.

    `r2` is of the map of full rank, `r2_cut` of `map`, the one within the size budget.
    """

    block: int
    r2: float
    r2_cut: float
    map: LinearBlock


@dataclass(frozen=True, slots=True)
class Replacement:
    """What replacing blocks by their maps costs: perplexity on part of the select split."""

    blocks: tuple[int, ...]
    perplexity: float
    increase: float  # over no replacement


@dataclass(frozen=True, slots=True)
class BlockChoice:
    """The block chosen and what the choice rests on; `together` replaces all candidates at once."""

    chosen: BlockFit | None
    fits: tuple[BlockFit, ...]
    candidates: tuple[Replacement, ...]
    together: Replacement | None
    tokens: int  # behind the perplexities


class BlockFitter:
    """The visitor that fits each block's residual as it passes by; only one block's moments are held at a time."""

    def __init__(
        self,
        hidden: int,
        block_parameters: int,
        fit_tokens: int,
        device: torch.device,
        reduction: float = REDUCTION,
    ) -> None:
        """The first `fit_tokens` tokens of the stream are fitted on, the others judge."""
        self.fits: list[BlockFit] = []
        self._hidden = hidden
        self._fit_tokens = fit_tokens
        self._device = device
        self._rank = rank_within(block_parameters / reduction, hidden)
        self._fit = Moments.zeros(hidden, hidden, device)
        self._select = Moments.zeros(hidden, hidden, device)

    def see(self, block: int, tokens: slice, before: Tensor, after: Tensor) -> None:
        """Count the block's inputs and what it adds to them."""
        cut = min(max(self._fit_tokens - tokens.start, 0), len(before))
        residual = after.double() - before.double()
        if cut > 0:
            self._fit.add(before[:cut], residual[:cut])
        if cut < len(before):
            self._select.add(before[cut:], residual[cut:])

    def finish(self, block: int) -> None:
        """Solve for the block's map and forget its moments."""
        ridge = choose_ridge(self._fit, self._select)
        stand_in = linear_block(self._fit, ridge, block, self._rank)
        weight = stand_in.up.double() @ stand_in.down.double()
        self.fits.append(
            BlockFit(
                block=block,
                r2=self._select.r2(ridge.weight, ridge.bias),
                r2_cut=self._select.r2(weight, stand_in.bias.double()),
                map=stand_in.to("cpu", torch.float32),
            )
        )
        self._fit = Moments.zeros(self._hidden, self._hidden, self._device)
        self._select = Moments.zeros(self._hidden, self._hidden, self._device)


def choose_block(
    model: ForcedModel,
    kv_cache: KVFormat,
    fits: Sequence[BlockFit],
    rows: Sequence[Tensor],
    wanted: int | None,
    *,
    batch_tokens: int,
    advance: Advance = lambda _tokens: None,
) -> BlockChoice:
    """The block whose replacement costs least perplexity on `rows`, of the later half's best few by R².

    `wanted` names the block instead; its cost is measured all the same.
    """
    later = [fit for fit in fits if fit.block >= model.blocks // 2]
    tried = sorted(later, key=lambda fit: -fit.r2_cut)[:CANDIDATES] if wanted is None else [fits[wanted]]
    tried.sort(key=lambda fit: fit.block)
    sets = [(fit,) for fit in tried] + ([tuple(tried)] if len(tried) > 1 else [])
    forks = {
        fit.block: ForcedModel(model.decoder.with_linear_block(_at(model, fit)), kv_cache, ())
        for fit in tried
    }
    losses = np.zeros(1 + len(sets))
    tokens = scored = 0
    for batch in batches(rows, batch_tokens, model.decoder.device):
        losses += _losses(model, forks, sets, batch)
        scored += int((batch.targets >= 0).sum())
        tokens += batch.tokens
        advance(batch.tokens)
    perplexities = np.exp(losses / scored)
    replacements = [
        Replacement(tuple(fit.block for fit in group), float(value), float(value - perplexities[0]))
        for group, value in zip(sets, perplexities[1:], strict=True)
    ]
    single = replacements[: len(tried)]
    best = min(range(len(tried)), key=lambda index: single[index].perplexity)
    together = replacements[-1] if len(tried) > 1 else None
    return BlockChoice(tried[best], tuple(fits), tuple(single), together, tokens)


def _at(model: ForcedModel, fit: BlockFit) -> LinearBlock:
    return fit.map.to(model.decoder.device, model.decoder.dtype)


@torch.inference_mode()
def _losses(
    model: ForcedModel,
    forks: dict[int, ForcedModel],
    sets: Sequence[tuple[BlockFit, ...]],
    batch: SequenceBatch,
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Summed loss of the batch without replacement and for each of `sets` of blocks replaced."""
    losses = np.zeros(1 + len(sets))
    walk = _Walk(model, batch)
    for number, group in enumerate(sets, 1):
        if len(group) == 1:  # shallowest first, so that all share one walk
            walk.to(group[0].block)
            losses[number] = _Walk(forks[group[0].block], batch, walk.hidden, walk.block).loss()
        else:
            losses[number] = _replaced_together(model, group, batch).loss()
    losses[0] = walk.loss()
    return losses


def _replaced_together(model: ForcedModel, group: Sequence[BlockFit], batch: SequenceBatch) -> "_Walk":
    walk = _Walk(model, batch)
    for fit in group:
        walk.to(fit.block)
        walk.replace(_at(model, fit))
    return walk


class _Walk:
    """A batch on its way through the blocks."""

    def __init__(
        self, model: ForcedModel, batch: SequenceBatch, hidden: Tensor | None = None, block: int = 0
    ) -> None:
        self._model, self._batch = model, batch
        self._geometry = batch.geometry(model.layout.page_tokens)
        self.block = block
        self.hidden = model.decoder.embed(batch.token_ids, batch.positions) if hidden is None else hidden

    def to(self, block: int) -> None:
        """Walk on to in front of `block`."""
        pages = self._model.pages(self._batch)
        self.hidden = self._model.decoder.run_blocks(self.hidden, self._geometry, pages, self.block, block)
        self.block = block

    def replace(self, stand_in: LinearBlock) -> None:
        """Pass the block in front through a map instead."""
        self.hidden = stand_in.apply(self.hidden)
        self.block += 1

    def loss(self) -> float:
        """Walk to the end: the summed −log probability of the tokens that follow, in nats."""
        self.to(self._model.blocks)
        rows = max(1, LOGITS_AT_ONCE // self._model.decoder.spec.vocab_size)
        total = 0.0
        for start in range(0, self._batch.tokens, rows):
            part = slice(start, start + rows)
            logits, targets = self._model.decoder.head(self.hidden[part]), self._batch.targets[part]
            total += float(F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum"))
        return total
