"""Passes of up to 512 tokens on a GPU as captured CUDA graphs: one launch for a run of blocks, not one per operation.

A graph is captured for a run of blocks over some pages, a number of tokens and a length of context, each rounded up to
one of few sizes. What is padded writes nothing and attends to nothing, and the kernels are row-invariant: a token's
state is that of a pass without graphs, to the bit. Tokens of several positions of a row (backfill, drafts, a chunk of
a prompt) go the same way as decode steps. The keys and values that tokens owe to blocks they skip are
projected in graphs of their own. A tick whose exits the device decides is one graph, with gates and head in it.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from exeunt.compression.device_pass import (
    CapturedBlocks,
    PassInputs,
    PassLayout,
    PassResults,
    run_device_pass,
)
from exeunt.compression.graph_pool import TOKENS, Captured, GraphPool, size_for
from exeunt.compression.kv_format import KVPages
from exeunt.compression.row_graphs import SharedOutputs
from exeunt.kernels.paged_batch import BatchLayout, PagedBatch

__all__ = ["TOKENS", "DecodeGraphs", "Inputs", "padded_layout", "rounded_context"]

SHORTEST_CONTEXT: Final = 512
"""Contexts are rounded up to this many tokens times a power of two."""
MOST_GRAPHS: Final = 320
"""Graphs that one decoder keeps of its blocks: beyond it passes run without, so that their memory has a bound."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the graphs of one size read: static tensors, filled before each launch."""

    hidden: Tensor  # [tokens, hidden]
    layout: BatchLayout  # of `numbers`
    numbers: Tensor  # [layout.numbers] int64
    batch: PagedBatch  # over `numbers`, each padded token a row of its own
    ramp: Tensor  # [2 * tokens + 1] int32: 0, 1, … up to tokens, then tokens

    @classmethod
    def empty(cls, tokens: int, context: int, page_tokens: int, hidden: Tensor) -> "Inputs":
        """Inputs that are all padding, for states like `hidden` [any, hidden] and pages of `page_tokens`."""
        device = hidden.device
        layout = padded_layout(tokens, context, page_tokens)
        numbers = torch.zeros(layout.numbers, dtype=torch.int64, device=device)
        ramp = torch.arange(2 * tokens + 1, dtype=torch.int32, device=device).clamp_(max=tokens)
        batch = layout.batch(numbers, tokens, tokens, context)
        batch.query_starts.copy_(ramp[: tokens + 1])
        inputs = cls(hidden.new_zeros(tokens, hidden.shape[1]), layout, numbers, batch, ramp)
        inputs.clear()
        return inputs

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.hidden.nbytes + self.numbers.nbytes + self.ramp.nbytes

    def clear(self) -> None:
        """Make every token padding."""
        self.numbers[: self.layout.places].fill_(-1)

    def fill(self, hidden: Tensor, batch: PagedBatch) -> None:
        """Take over a batch of no more tokens and no longer contexts; what is left over becomes padding."""
        self.hidden[: batch.tokens].copy_(hidden)
        packed = batch.packed
        if packed is not None and packed.layout == self.layout:  # padded where it was made
            self.numbers.copy_(packed.numbers)
            return
        self._fill_places(batch)
        tokens, rows, size = batch.tokens, batch.rows, self.hidden.shape[0]
        starts = self.batch.query_starts
        starts[: rows + 1].copy_(batch.query_starts)
        starts[rows + 1 :].copy_(self.ramp[tokens + 1 : tokens + 1 + size - rows])
        width = min(batch.page_tables.shape[1], self.batch.page_tables.shape[1])
        self.batch.page_tables[:rows, :width].copy_(batch.page_tables[:, :width])

    def fill_places(self, hidden: Tensor, batch: PagedBatch) -> None:
        """Take over no more than where a batch's tokens are and go, and their states."""
        self.hidden[: batch.tokens].copy_(hidden)
        packed, places = batch.packed, self.layout.places
        if packed is not None and packed.layout.tokens == self.layout.tokens:
            self.numbers[:places].copy_(packed.numbers[:places])
        else:
            self._fill_places(batch)

    def _fill_places(self, batch: PagedBatch) -> None:
        if batch.tokens < self.layout.tokens:
            self.clear()
        self.batch.positions[: batch.tokens].copy_(batch.positions)
        self.batch.slots[: batch.tokens].copy_(batch.slots)


_Key = tuple[str, Hashable, int, int, int, int]
_Found = tuple[Captured[tuple[Tensor, ...]], Inputs]


class DecodeGraphs:
    """The captured passes of one decoder's blocks, made when a size is first met.

    All graphs share one pool of memory: they run one after the other, and what a graph leaves is copied at once.
    """

    def __init__(
        self,
        blocks: CapturedBlocks,
        most_context: int,
        pool: GraphPool,
        outputs: SharedOutputs | None = None,
    ) -> None:
        """`most_context` tokens are the longest that a sequence may become: a graph's context never exceeds its
        `rounded_context`, for which rotary tables must be laid out before the first capture. `outputs` are where whole
        passes leave logits, and others what nobody reads any more then."""
        self.pool = pool
        self._logits = outputs or SharedOutputs(pool)
        self._states = SharedOutputs(pool, TOKENS[-1])
        self._exits: dict[_Key, object] = {}  # keep the ids in the keys from being another's, as `_pages` do
        self._blocks = blocks
        self._most_context = rounded_context(most_context)
        self._inputs: dict[tuple[int, int, int], Inputs] = {}
        self._numbers: dict[PassLayout, Tensor] = {}
        self._graphs: dict[_Key, _Found | None] = {}
        self._pages: dict[int, KVPages] = {}  # keeps the ids in the keys from being another's

    @property
    def count(self) -> int:
        """Graphs captured so far."""
        return sum(found is not None for found in self._graphs.values())

    def run(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> Tensor | None:
        """The state behind block `stop` - 1 of `hidden` [tokens, hidden] in front of block `start`; `hidden` stays.

        None where no graph fits: too many tokens, too many graphs, or a capture that failed.
        """
        context = rounded_context(batch.max_context)
        tokens = size_for(batch.tokens)
        if tokens is None or batch.rows > tokens or context > self._most_context:
            return None
        blocks = self._blocks

        def run(inputs: Inputs) -> tuple[Tensor, ...]:
            return (blocks.run(inputs.hidden.clone(), inputs.batch, pages, start, stop),)

        found = self._found(("run", start, stop, tokens, context, id(pages)), hidden, pages, run)
        if found is None:
            return None
        captured, inputs = found
        inputs.fill(hidden, batch)
        captured.replay()
        return captured.result[0][: batch.tokens].clone()

    def run_pass(
        self,
        asked: PassInputs,
        head: Callable[[Tensor], Tensor],
        depth: int,
        hidden: Tensor,
        batch: PagedBatch,
        pages: KVPages,
    ) -> PassResults | None:
        """`run_device_pass` over `hidden` [tokens, hidden], for a batch that was padded where it was made.

        `head` is the same at every call. None where no graph fits, and nothing has been done.
        """
        context, tokens, layout = rounded_context(batch.max_context), size_for(batch.tokens), asked.layout
        if tokens != layout.tokens or batch.packed is None or context > self._most_context:
            return None
        blocks = self._blocks

        def run(inputs: Inputs) -> tuple[Tensor, ...]:
            if layout not in self._numbers:  # in the run that compiles: a capture finds them made
                self._numbers[layout] = self._nothing_asked(asked)
            own = replace(asked, numbers=self._numbers[layout])
            *results, states = run_device_pass(blocks, head, depth, own, inputs.hidden, inputs.batch, pages)
            kept = (*self._logits.like(tuple(results)), *self._states.like((states,)))
            for shared, result in zip(kept, (*results, states), strict=True):
                shared[: len(result)].copy_(result)
            return kept

        key = ("pass", asked.key, depth, tokens, context, id(pages))
        found = self._found(key, hidden, pages, run)
        if key in self._graphs:  # a capture that failed among them; nothing where none may be made any more
            self._exits.setdefault(key, asked.exits)
        if found is None:
            return None
        captured, inputs = found
        inputs.fill(hidden, batch)
        self._numbers[layout].copy_(asked.numbers)
        captured.replay()
        *of_logits, states = captured.result
        logits, left_at = (each[: layout.logits].clone() for each in of_logits)
        return PassResults(logits, left_at, states[: batch.tokens].clone())

    def _nothing_asked(self, asked: PassInputs) -> Tensor:
        """Numbers by which nobody leaves, for captures over nothing but padding."""
        with torch.inference_mode(False):
            numbers = torch.zeros_like(asked.numbers)
            asked.layout.of_tokens(numbers)[1].fill_(asked.layout.logits)
        self.pool.note(numbers.nbytes)
        return numbers

    def project_kv(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> bool:
        """Write the keys and values that blocks `start` to `stop` - 1 make of `hidden` [tokens, hidden].

        False where no graph fits, and nothing is written.
        """
        tokens = size_for(batch.tokens)
        if tokens is None or batch.max_context > self._most_context:
            return False
        blocks = self._blocks

        def project(inputs: Inputs) -> tuple[Tensor, ...]:
            blocks.project_kv(inputs.hidden, inputs.batch, pages, start, stop)
            return ()

        # nothing attends: how long contexts are does not matter
        key = ("project", start, stop, tokens, SHORTEST_CONTEXT, id(pages))
        found = self._found(key, hidden, pages, project)
        if found is None:
            return False
        captured, inputs = found
        inputs.fill_places(hidden, batch)
        captured.replay()
        return True

    def _found(
        self, key: _Key, hidden: Tensor, pages: KVPages, run: Callable[[Inputs], tuple[Tensor, ...]]
    ) -> _Found | None:
        """The graph of `key` and what it reads, captured over nothing but padding where it is new."""
        if key not in self._graphs:
            if not self.pool.may_capture(self.count, MOST_GRAPHS):
                return None
            _, _, _, tokens, context, _ = key
            self._pages[id(pages)] = pages
            size = (tokens, context, pages.layout.page_tokens)
            captured = self.pool.capture(
                f"{tokens} tokens and a context of {context}",
                lambda: self._make_inputs(size, hidden),
                lambda: run(self._inputs[size]),
            )
            self._graphs[key] = None if captured is None else (captured, self._inputs[size])
        return self._graphs[key]

    def _make_inputs(self, size: tuple[int, int, int], hidden: Tensor) -> None:
        """Inputs of that size that are all padding."""
        if size in self._inputs:
            self._inputs[size].clear()
            return
        with torch.inference_mode(False):  # what is filled in any mode must be made outside of it
            inputs = self._inputs[size] = Inputs.empty(*size, hidden)
        self.pool.note(inputs.nbytes)


def rounded_context(context: int) -> int:
    """The context that a graph is captured for: attention's work follows each token's own, not this."""
    rounded = SHORTEST_CONTEXT
    while rounded < context:
        rounded *= 2
    return rounded


@lru_cache(maxsize=1024)
def padded_layout(tokens: int, context: int, page_tokens: int) -> BatchLayout:
    """How the numbers of a graph's batch lie: `tokens` tokens, as many rows, pages for `context` tokens each."""
    return BatchLayout(tokens, tokens, -(-rounded_context(context) // page_tokens))
