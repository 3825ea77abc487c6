"""Hidden states of a whole split, block by block: what is fitted and trained on.

One array of states is kept, that of the current block's inputs, and overwritten with its outputs; whoever wants a
block's states for longer keeps its own copy. Arrays live in files of a scratch folder, mapped into memory, so that a
large model's do not have to fit.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from exeunt.calibration.journal import Entry
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

    def record(self, block: int) -> Entry:
        """What it has learned of the finished `block` and must know to go on behind it: tensors, and JSON values."""
        ...

    def restore(self, block: int, entry: Entry) -> bool:
        """Learn of `block` from what `record` said; False where that cannot be, and the pass has to begin anew."""
        ...

    def forget(self) -> None:
        """Know of no block: the pass begins anew."""
        ...


class Scratch:
    """Arrays of hidden states in the files of one folder; the folder's owner deletes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._arrays = 0

    def array(self, tokens: int, hidden: int, dtype: torch.dtype, name: str | None = None) -> Tensor:
        """An array [tokens, hidden] on the CPU, backed by a file: zeroed, or what stands in the file called `name`."""
        path = self._folder / (f"states-{self._arrays}" if name is None else name)
        self._arrays += name is None
        flat = torch.from_file(str(path), shared=True, size=tokens * hidden, dtype=dtype)
        return flat.view(tokens, hidden)

    def sync(self, name: str) -> None:
        """Force the array called `name` onto the disk."""
        descriptor = os.open(self._folder / name, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def digest(states: Tensor) -> str:
    """What tells whether an array on the CPU is as it was: 128 bits, hexadecimal."""
    data = states.contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(data.data, digest_size=16).hexdigest()


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
        self.states = {block: scratch.array(tokens, hidden, dtype, self._name(block)) for block in blocks}
        self._scratch = scratch

    def see(self, block: int, tokens: slice, before: Tensor, after: Tensor) -> None:
        """Keep `after` where the block is one of those."""
        if block in self.states:
            self.states[block][tokens] = after

    def finish(self, block: int) -> None:
        """Nothing to do."""

    def record(self, block: int) -> Entry:
        """A digest of the states, which are on the disk when it returns."""
        if block not in self.states:
            return {}, None
        self._scratch.sync(self._name(block))
        return {}, digest(self.states[block])

    def restore(self, block: int, entry: Entry) -> bool:
        """Whether the states in the scratch folder are those that were recorded."""
        return block not in self.states or digest(self.states[block]) == entry[1]

    def forget(self) -> None:
        """Nothing to do: the states are overwritten."""

    @staticmethod
    def _name(block: int) -> str:
        return f"behind-block-{block}"
