"""What a text loses where blocks are replaced by linear maps: any number of replacements in one walk.

The walk goes block by block, and every replacement is carried along from its first block on, so that what is in front
of it is run once, and a decoder that streams its blocks reads each of them once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from exeunt.calibration.bootstrap import Floats, Measure, block_difference, block_ratio, resamples
from exeunt.calibration.sequence_batch import SequenceBatch, batches
from exeunt.calibration.teacher_forcing import ForcedModel, logit_rows
from exeunt.calibration.text_units import text_units
from exeunt.compression.linear_block import LinearBlock

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Losses:
    """−log probability summed by block of text, without replacement and with each: what intervals are drawn from."""

    unreplaced: Floats  # [blocks]
    replaced: tuple[Floats, ...]  # each [blocks]
    scored: Floats  # [blocks], tokens that have a following one
    drawn: NDArray[np.int64]  # [resamples, blocks]
    where: NDArray[np.int64]  # [tokens], the block of text that each token is in

    @property
    def tokens(self) -> int:
        """Tokens of the text."""
        return len(self.where)

    @property
    def text_blocks(self) -> int:
        """Blocks of text, which are what is drawn."""
        return len(self.scored)

    def perplexity(self, number: int | None) -> Measure:
        """The perplexity with replacement `number`, or with none."""
        losses = self.unreplaced if number is None else self.replaced[number]
        return block_ratio(losses, self.scored, self.drawn, np.exp)

    def increase(self, number: int) -> Measure:
        """How much replacement `number` adds to the perplexity."""
        return block_difference(self.replaced[number], self.unreplaced, self.scored, self.drawn, np.exp)


def walk_work(rows: Sequence[Tensor], blocks: int) -> int:
    """What `advance` of `losses_of` is told in all."""
    return (blocks + 1) * sum(map(len, rows))


@torch.inference_mode()
def losses_of(
    model: ForcedModel,
    replacements: Sequence[Sequence[LinearBlock]],
    rows: Sequence[Tensor],
    *,
    batch_tokens: int,
    seed: int,
    documents: Sequence[int] | None = None,
    known: Losses | None = None,
    advance: Advance = lambda _tokens: None,
) -> Losses:
    """The losses of `model` on `rows` with each of `replacements`, sets of maps for different blocks, none empty.

    `documents` numbers each row's document, for the intervals (see `text_units`). `known` are losses of the same model,
    rows, documents and seed, whose pass without replacement is then not made again.
    `advance` is told every batch's tokens once a block and once for the head, however many replacements pass with it.
    """
    decoder = model.decoder
    groups = list(batches(rows, batch_tokens, decoder.device))
    states = [decoder.embed(group.token_ids, group.positions) for group in groups]
    unreplaced, forks = _Fork((), states), [_Fork(tuple(each)) for each in replacements]
    last = max((fork.first for fork in forks), default=0) if known is not None else model.blocks
    for block in range(model.blocks):
        for fork in forks:
            if fork.first == block:
                fork.states = list(unreplaced.states)
        if block >= last:
            unreplaced.states = []
        _pass_block(model, [unreplaced, *forks], groups, block, advance)
    if known is None:
        units = text_units(rows, documents)
        sums = _sums(model, [unreplaced, *forks], groups, units.where, units.count, advance)
        targets = torch.cat([group.targets for group in groups]).cpu().numpy()
        scored = np.bincount(units.where[targets >= 0], minlength=units.count).astype(np.float64)
        return Losses(sums[0], tuple(sums[1:]), scored, resamples(units.count, seed), units.where)
    sums = _sums(model, forks, groups, known.where, known.text_blocks, advance)
    return replace(known, replaced=tuple(sums))


class _Fork:
    """A walk with some blocks replaced; without states until its first one is reached."""

    def __init__(self, maps: Sequence[LinearBlock], states: Sequence[Tensor] = ()) -> None:
        self.maps = {each.index: each for each in maps}
        self.first = min(self.maps, default=-1)
        self.states = list(states)  # of each batch, [T, H]


def _pass_block(
    model: ForcedModel, forks: Sequence[_Fork], groups: Sequence[SequenceBatch], block: int, advance: Advance
) -> None:
    """Take every fork that has states behind `block`."""
    decoder = model.decoder
    for number, group in enumerate(groups):
        pages, geometry = model.pages(group), group.geometry(model.layout.page_tokens)
        for fork in forks:
            if not fork.states:
                continue
            stand_in, hidden = fork.maps.get(block), fork.states[number]
            if stand_in is None:
                fork.states[number] = decoder.run_blocks(hidden, geometry, pages, block, block + 1)
            else:
                fork.states[number] = stand_in.to(decoder.device, decoder.dtype).apply(hidden)
        advance(group.tokens)


def _sums(
    model: ForcedModel,
    forks: Sequence[_Fork],
    groups: Sequence[SequenceBatch],
    where: NDArray[np.int64],
    blocks: int,
    advance: Advance,
) -> list[Floats]:
    """Every fork's −log probabilities, summed by block of text, of which `where` [tokens] numbers `blocks`."""
    sums, start = np.zeros((len(forks), blocks)), 0
    for number, group in enumerate(groups):
        own = where[start : start + group.tokens]
        for fork, total in zip(forks, sums, strict=True):
            nll = _nll(model, fork.states[number], group.targets)
            total += np.bincount(own, weights=nll, minlength=len(total))
        start += group.tokens
        advance(group.tokens)
    return list(sums)


def _nll(model: ForcedModel, hidden: Tensor, targets: Tensor) -> Floats:
    """−log probability of `targets` [T], 0 where there is none, by states [T, H] behind the last block."""
    rows = logit_rows(model.decoder.spec.vocab_size, hidden.device)
    parts = [
        F.cross_entropy(
            model.decoder.head(hidden[start : start + rows]),
            targets[start : start + rows],
            ignore_index=-1,
            reduction="none",
        )
        for start in range(0, len(hidden), rows)
    ]
    return torch.cat(parts).double().cpu().numpy().astype(np.float64)
