"""A tick on a GPU whose exits the device decides: no gate is waited for, and one CUDA graph holds all of it.

A token that leaves, or that is not there yet, keeps its place in the batch and is missing from it: it writes no keys
and values, attends to nothing, and products skip tiles of which all tokens are missing. What the others get are the
bits of a pass without it, for the kernels are row-invariant. Weights are read as long as one token of a tile is there,
and gates and the head are asked about all: what this saves of a batch is the host's part, and attention.

What tokens may do is `exeunt.kernels.model_pass`'s, which is the same on a CPU.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.compression.gate_steps import GateSteps, Project
from exeunt.compression.graph_pool import ROWS, size_for
from exeunt.compression.kv_format import KVPages
from exeunt.kernels.model_pass import AtExit
from exeunt.kernels.paged_batch import PagedBatch

_COARSE: Final = (8, 32, 128)
"""Numbers of rows of logits that graphs are captured for where other tokens are in the pass: every pair is a graph."""


@dataclass(frozen=True, slots=True)
class PassExit:
    """An exit at which something happens in a pass."""

    index: int  # among all exits of the model
    depth: int  # blocks in front of it
    asked: bool  # whether a token may leave here
    takes_in: bool  # whether tokens that waited behind it may come in
    steps: GateSteps
    project: Project

    @property
    def key(self) -> Hashable:
        """What tells graphs apart."""
        return self.index, self.depth, self.asked, self.takes_in, self.steps.key, id(self.project)


def logit_rows(wanted: int, tokens: int) -> int | None:
    """Rows of logits of a graph of `tokens` where logits of so many of them are wanted; None where there is none."""
    found = size_for(wanted, ROWS)
    return found if found == tokens else size_for(wanted, _COARSE)


@dataclass(frozen=True, slots=True)
class PassLayout:
    """Where the numbers lie that say what `tokens` tokens do, with L `logits` rows of logits: int64, for one copy.

    Of each token where it comes in (0 the first block, e + 1 behind exit e), and the row of logits by which its row of
    the batch leaves, L for none. Of each row of logits its token, the exits that it asks as bits, what leaving means
    (`AtExit`) and the bits of a float64, the confidence at which it leaves. Zeros ask nothing.
    """

    tokens: int
    logits: int

    @property
    def count(self) -> int:
        """How many there are in all."""
        return 2 * self.tokens + 4 * self.logits

    def of_tokens(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Where each comes in, and the row of logits by which it leaves: [tokens] int64 each."""
        entries, gate_rows = numbers[: 2 * self.tokens].view(2, -1)
        return entries, gate_rows

    def of_logits(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token, exits asked and what leaving means, [logits] int64, and the threshold [logits] float32."""
        tokens, asks, at_exits, thresholds = numbers[2 * self.tokens : self.count].view(4, -1)
        return tokens, asks, at_exits, thresholds.view(torch.float64).float()


@dataclass(frozen=True, slots=True)
class PassInputs:
    """What the tokens of one pass do, beside where they are."""

    layout: PassLayout
    numbers: Tensor  # [layout.count] int64, on the device
    exits: tuple[PassExit, ...]  # where something happens, ascending
    propagates: bool  # whether a token may leave for good
    last: int  # exits that the model has: what stands for its end

    @property
    def key(self) -> Hashable:
        """What tells graphs apart."""
        return self.layout.logits, self.propagates, tuple(each.key for each in self.exits)


@dataclass(frozen=True, slots=True)
class PassResults:
    """What became of a pass's tokens, on their device: copies, which the next replay leaves alone."""

    logits: Tensor  # [L, V] float32, those of the exit where the token left, else the head's
    left_at: Tensor  # [L] int64, at which exit it did; the number of all exits for none
    states: Tensor  # [T, H], where each token stopped; of those that never came in, anything


class CapturedBlocks(Protocol):
    """What graphs hold of a decoder's blocks."""

    def run(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> Tensor:
        """The state behind a run of blocks of the state in front of it, which it may overwrite."""
        ...

    def project_kv(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> None:
        """Write the keys and values that a run of blocks makes of an exit's state."""
        ...


def run_device_pass(
    blocks: CapturedBlocks,
    head: Callable[[Tensor], Tensor],
    depth: int,
    asked: PassInputs,
    hidden: Tensor,
    batch: PagedBatch,
    pages: KVPages,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run all `depth` blocks over the tokens of `batch` and return what `PassResults` holds.

    `hidden` [T, H] is each token's state where it comes in, and stays. Nothing here waits for the device.
    """
    entries, gate_rows = asked.layout.of_tokens(asked.numbers)
    tokens, asks, at_exits, thresholds = asked.layout.of_logits(asked.numbers)
    places = _places(batch, tokens) if asked.propagates else None
    left_at = torch.full_like(asks, asked.last)
    gone = torch.zeros_like(asks, dtype=torch.bool)  # whose row of the batch is on its way no more
    there = batch.keeping(entries == 0) if any(each.takes_in for each in asked.exits) else batch
    state, states, logits, start = hidden.clone(), hidden, None, 0
    for exit_ in asked.exits:
        state = blocks.run(state, there, pages, start, exit_.depth)
        start = exit_.depth
        if exit_.asked:
            own = state.index_select(0, tokens)
            may = ((asks >> exit_.index) % 2 > 0) & ~gone
            leaves, said = exit_.steps.leaving(own, thresholds.masked_fill(~may, torch.inf), exit_.project)
            logits = said if logits is None else torch.where(leaves[:, None], said, logits)
            left_at = left_at.masked_fill(leaves, exit_.index)
            thresholds = thresholds.masked_fill(leaves, torch.inf)
            if places is not None:
                for_good = leaves & (at_exits == AtExit.LEAVES)
                blocks.project_kv(own, places.keeping(for_good), pages, start, depth)
            stops = leaves & (at_exits != AtExit.STAYS)
            gone = gone | stops
            stopping = _of_rows(stops, gate_rows) & (entries <= exit_.index)
            states = torch.where(stopping[:, None], state, states)
        if exit_.takes_in:  # what blocks have made of its place meanwhile is nobody's
            state = torch.where((entries == exit_.index + 1)[:, None], hidden, state)
        there = batch.keeping((entries <= exit_.index + 1) & ~_of_rows(gone, gate_rows))
    state = blocks.run(state, there, pages, start, depth)
    final = head(state.index_select(0, tokens))
    if logits is not None:
        final = torch.where((left_at == asked.last)[:, None], final, logits)
    return final, left_at, torch.where(_of_rows(gone, gate_rows)[:, None], states, state)


def _of_rows(marked: Tensor, gate_rows: Tensor) -> Tensor:
    """What is said of rows of logits, [L] bool, said of the tokens that leave by them: [T] bool."""
    return F.pad(marked, (0, 1)).index_select(0, gate_rows)


def _places(batch: PagedBatch, tokens: Tensor) -> PagedBatch:
    """Where `tokens` [L] of a batch are, for writing their keys and values: nothing attends there."""
    return PagedBatch(
        batch.positions.index_select(0, tokens),
        batch.slots.index_select(0, tokens),
        batch.query_starts,
        batch.page_tables,
        batch.max_context,
    )
