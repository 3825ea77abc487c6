"""Hidden states of a whole split, block by block: what is fitted and trained on.

One array of states is kept, that of the current block's inputs, and overwritten with its outputs; whoever wants a
block's states for longer keeps its own copy. Arrays live in files of a scratch folder, mapped into memory, so that a
large model's do not have to fit.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from exeunt.calibration.sequence_batch import SequenceBatch, batches
from exeunt.calibration.teacher_forcing import ForcedModel

Advance = Callable[[int], None]


class BlockVisitor(Protocol):
    """Looks on while a split passes the blocks one after another."""

    def see(self, block: int, tokens: slice, before: Tensor, after: Tensor) -> None:
        """States [T, H] in front of and behind `block`, on the model's device, of the split's `tokens`."""
        ...

    def finish(self, block: int) -> None:
        """All tokens have passed `block`."""
        ...


class Scratch:
    """Arrays of hidden states in the files of one folder; the folder's owner deletes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._arrays = 0

    def array(self, tokens: int, hidden: int, dtype: torch.dtype) -> Tensor:
        """A zeroed array [tokens, hidden] on the CPU, backed by a file."""
        path = self._folder / f"states-{self._arrays}"
        self._arrays += 1
        flat = torch.from_file(str(path), shared=True, size=tokens * hidden, dtype=dtype)
        return flat.view(tokens, hidden)


def stream_blocks(
    model: ForcedModel,
    rows: Sequence[Tensor],
    visitors: Sequence[BlockVisitor],
    scratch: Scratch,
    *,
    batch_tokens: int,
    advance: Advance = lambda _tokens: None,
) -> Tensor:
    """Pass `rows` (each [n] int64) through the model's blocks one block at a time, exits off.

    Returns the states behind the last block, [tokens, hidden] on the CPU, tokens in the order of `rows`. `advance` is
    told each batch's tokens once per block.
    """
    decoder = model.decoder
    groups = list(batches(rows, batch_tokens, decoder.device))
    starts = _starts(groups)
    states = scratch.array(sum(group.tokens for group in groups), decoder.spec.hidden_size, decoder.dtype)
    for group, start in zip(groups, starts, strict=True):
        states[start : start + group.tokens] = decoder.embed(group.token_ids, group.positions)
    for block in range(decoder.spec.blocks):
        for group, start in zip(groups, starts, strict=True):
            tokens = slice(start, start + group.tokens)
            before = states[tokens].to(decoder.device)
            with torch.inference_mode():
                geometry = group.geometry(model.layout.page_tokens)
                after = decoder.run_blocks(before, geometry, model.pages(group), block, block + 1)
            for visitor in visitors:
                visitor.see(block, tokens, before, after)
            states[tokens] = after
            advance(group.tokens)
        for visitor in visitors:
            visitor.finish(block)
    return states


def _starts(groups: Sequence[SequenceBatch]) -> list[int]:
    starts, total = [], 0
    for group in groups:
        starts.append(total)
        total += group.tokens
    return starts


class StateKeeper:
    """Keeps the states behind some blocks: the visitor that exits are trained on."""

    def __init__(
        self, blocks: Sequence[int], tokens: int, hidden: int, dtype: torch.dtype, scratch: Scratch
    ) -> None:
        self.states = {block: scratch.array(tokens, hidden, dtype) for block in blocks}

    def see(self, block: int, tokens: slice, before: Tensor, after: Tensor) -> None:
        """Keep `after` where the block is one of those."""
        if block in self.states:
            self.states[block][tokens] = after

    def finish(self, block: int) -> None:
        """Nothing to do."""
