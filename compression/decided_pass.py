"""A tick on a GPU whose exits the device decides: no gate is waited for, and one CUDA graph holds all of it.

A token that leaves, or that is not there yet, keeps its place in the batch and is missing from it: it writes no keys
and values, attends to nothing, and products skip tiles of which all tokens are missing. What the others get are the
bits of a pass without it, for the kernels are row-invariant. Weights are read as long as one token of a tile is there:
what this saves of a batch is the host's part, and attention.

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

    place: int  # among all exits of the model
    depth: int  # blocks in front of it
    asked: bool  # whether a token may leave here
    joined: bool  # whether tokens that waited behind it come in
    steps: GateSteps
    project: Project

    @property
    def key(self) -> Hashable:
        """The same for the same happening at the same exit."""
        return self.place, self.depth, self.asked, self.joined, self.steps.key, id(self.project)


def logit_rows(asking: int, tokens: int) -> int | None:
    """Rows of logits that a graph of `tokens` is captured for where so many are asked; None where there is none."""
    found = size_for(asking, ROWS)
    return found if found == tokens else size_for(asking, _COARSE)


@dataclass(frozen=True, slots=True)
class PassNumbers:
    """Where the numbers lie that say what `tokens` tokens do, L `logits` rows of them: int64, one copy moves them all.

    Of each token where it comes in (0 the first block, e + 1 behind exit e) and which of the rows of logits is its
    row's that may leave, L for none. Of each row of logits its token, the exits that it asks as bits, what leaving
    means (`AtExit`) and, as the bits of a float64, the confidence at which it leaves: infinity where there is none.
    """

    tokens: int
    logits: int

    @property
    def count(self) -> int:
        """How many there are in all."""
        return 2 * self.tokens + 4 * self.logits

    def of_tokens(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Where each comes in, and its row's row of logits: [tokens] int64 each."""
        entries, askers = numbers[: 2 * self.tokens].view(2, -1)
        return entries, askers

    def of_logits(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token, exits asked and what leaving means, [logits] int64, and the threshold [logits] float32."""
        wanted, asks, at_exits, thresholds = numbers[2 * self.tokens : self.count].view(4, -1)
        return wanted, asks, at_exits, thresholds.view(torch.float64).float()


@dataclass(frozen=True, slots=True)
class PassDecisions:
    """What the tokens of one pass may do."""

    layout: PassNumbers
    numbers: Tensor  # [layout.count] int64, on the device
    exits: tuple[PassExit, ...]  # where something happens, ascending
    propagates: bool  # whether a token may leave for good
    last: int  # exits that the model has: what stands for its end

    @property
    def key(self) -> Hashable:
        """What a graph is captured for."""
        return self.layout.logits, self.propagates, tuple(each.key for each in self.exits)


@dataclass(frozen=True, slots=True)
class DecidedPass:
    """What became of a pass's tokens, on their device; `Decoder.decide` leaves copies in it."""

    logits: Tensor  # [L, V] float32, those of the exit where the token left, else the head's
    left_at: Tensor  # [L] int64, at which exit it did; the number of all exits for none
    states: Tensor  # [T, H], where each token stopped; of those that never came in, anything


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
    depth: int,
    decisions: PassDecisions,
    hidden: Tensor,
    batch: PagedBatch,
    pages: KVPages,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run all `depth` blocks over the tokens of `batch` and return what `DecidedPass` holds.

    `hidden` [T, H] is each token's state where it comes in, and stays. Nothing here waits for the device.
    """
    entries, askers = decisions.layout.of_tokens(decisions.numbers)
    wanted, asks, at_exits, thresholds = decisions.layout.of_logits(decisions.numbers)
    places = _places(batch, wanted) if decisions.propagates else None
    left_at = torch.full_like(asks, decisions.last)
    gone = torch.zeros_like(asks, dtype=torch.bool)  # whose row is on its way no more
    there = batch.only(entries == 0) if any(each.joined for each in decisions.exits) else batch
    state, states, logits, start = hidden.clone(), hidden, None, 0
    for exit_ in decisions.exits:
        state = blocks.run(state, there, pages, start, exit_.depth)
        start = exit_.depth
        if exit_.asked:
            own = state.index_select(0, wanted)
            may = (asks >> exit_.place) % 2 > 0
            leaves, said = exit_.steps.leaving(
                own, thresholds.masked_fill(~may | gone, torch.inf), exit_.project
            )
            logits = said if logits is None else torch.where(leaves[:, None], said, logits)
            left_at = left_at.masked_fill(leaves, exit_.place)
            thresholds = thresholds.masked_fill(leaves, torch.inf)
            if places is not None:
                for_good = leaves & (at_exits == AtExit.LEAVES)
                blocks.project_kv(own, places.only(for_good), pages, start, depth)
            stops = leaves & (at_exits != AtExit.STAYS)
            gone = gone | stops
            stopping = _of_rows(stops, askers) & (entries <= exit_.place)
            states = torch.where(stopping[:, None], state, states)
        if exit_.joined:  # what blocks have made of its place meanwhile is nobody's
            state = torch.where((entries == exit_.place + 1)[:, None], hidden, state)
        there = batch.only((entries <= exit_.place + 1) & ~_of_rows(gone, askers))
    state = blocks.run(state, there, pages, start, depth)
    final = head(state.index_select(0, wanted))
    if logits is not None:
        final = torch.where((left_at == decisions.last)[:, None], final, logits)
    return final, left_at, torch.where(_of_rows(gone, askers)[:, None], states, state)


def _of_rows(marked: Tensor, askers: Tensor) -> Tensor:
    """What is said of rows of logits, [L] bool, said of their rows' tokens: [T] bool."""
    return F.pad(marked, (0, 1)).index_select(0, askers)


def _places(batch: PagedBatch, wanted: Tensor) -> PagedBatch:
    """Where the tokens `wanted` [L] are, for writing their keys and values: nothing attends there."""
    return PagedBatch(
        batch.positions.index_select(0, wanted),
        batch.slots.index_select(0, wanted),
        batch.query_starts,
        batch.page_tables,
        batch.max_context,
    )
