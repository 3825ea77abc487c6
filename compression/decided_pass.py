"""A decode step on a GPU whose exits the device decides: no gate is waited for, and one CUDA graph holds all of it.

A token that leaves keeps its place in the batch and is missing from it from there on: it writes no keys and values of
deeper blocks but those its exit's state makes, attends to nothing, and products skip tiles of which all tokens are
missing. What the tokens that stay get are the bits of a pass without those that left, for the kernels are
row-invariant. Weights are still read as long as one token of a tile stays: what this saves is the host's part.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from exeunt.compression.gate_steps import GateSteps, Project
from exeunt.compression.kv_format import KVPages
from exeunt.kernels.paged_batch import PagedBatch


@dataclass(frozen=True, slots=True)
class AskedExit:
    """An exit that a pass asks on its way."""

    depth: int  # blocks in front of it
    steps: GateSteps
    project: Project

    @property
    def key(self) -> Hashable:
        """The same for the same exit that projects with the same."""
        return self.depth, self.steps.key, id(self.project)


@dataclass(frozen=True, slots=True)
class DecidedPass:
    """What became of T tokens, on their device; `Decoder.decide` leaves copies in it."""

    logits: Tensor  # [T, V] float32, of where each token left
    left_at: (
        Tensor  # [T] int32, the place of that exit among those asked; behind the last for the model's end
    )
    states: (
        Tensor  # [exits, T, H], behind the blocks in front of each exit; of tokens that had left, anything
    )


class Passes(Protocol):
    """What a decided pass needs of a decoder's blocks."""

    def run(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> Tensor:
        """The state behind a run of blocks of the state in front of it, which it may overwrite."""
        ...

    def project_kv(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> None:
        """Write the keys and values that a run of blocks makes of an exit's state."""
        ...


def decided_pass(
    blocks: Passes,
    head: Callable[[Tensor], Tensor],
    exits: Sequence[AskedExit],
    last: int,
    hidden: Tensor,
    batch: PagedBatch,
    pages: KVPages,
    thresholds: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run all `last` blocks over one token of each row and return what `DecidedPass` holds.

    `hidden` [T, H] may be overwritten. `thresholds` [T] float32 is the confidence at which each token leaves, infinity
    for one that may not; `exits`, at least one, ascend. Nothing here waits for the device.
    """
    left_at = torch.full_like(thresholds, len(exits), dtype=torch.int32)
    logits: Tensor | None = None
    states, start, all_there = [], 0, batch
    for place, asked in enumerate(exits):
        hidden = blocks.run(hidden, batch, pages, start, asked.depth)
        start = asked.depth
        states.append(hidden.clone())  # blocks add in place
        leaves, own = asked.steps.leaving(hidden, thresholds, asked.project)
        blocks.project_kv(states[-1], all_there.only(leaves), pages, start, last)
        left_at = left_at.masked_fill(leaves, place)
        logits = own if logits is None else torch.where(leaves[:, None], own, logits)
        thresholds = thresholds.masked_fill(leaves, torch.inf)
        batch = all_there.only(left_at == len(exits))
    final = head(blocks.run(hidden, batch, pages, start, last))
    if logits is not None:
        final = torch.where((left_at == len(exits))[:, None], final, logits)
    return final, left_at, torch.stack(states)
