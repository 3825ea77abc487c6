"""Passes of few tokens on a GPU as captured CUDA graphs: one launch for a run of blocks, not one per operation.

A graph is captured for a run of blocks over some pages, a number of tokens and a length of context, each rounded up to
one of few sizes. What is padded writes nothing and attends to nothing, and the kernels are row-invariant: a token's
state is that of a pass without graphs, to the bit. Tokens of several positions of a row (backfill, drafts, a short
chunk of a prompt) go the same way as decode steps.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from exeunt.compression.kv_format import KVPages
from exeunt.kernels.paged_batch import PagedBatch

TOKENS: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of tokens that graphs are captured for: a batch takes the next one up, a larger batch none."""
SHORTEST_CONTEXT: Final = 512
"""Contexts are rounded up to this many tokens times a power of two."""
MOST_GRAPHS: Final = 192
"""Graphs that one decoder keeps: beyond it passes run without, so that their memory has a bound."""
SPARE_MEMORY: Final = 0.05
"""The share of the device's memory that captures leave free: passes without graphs need room too."""

RunBlocks = Callable[[Tensor, PagedBatch, KVPages, int, int], Tensor]
"""The state behind a run of blocks of the state in front of it, which it may overwrite."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the graphs of one size read: static tensors, filled before each launch."""

    hidden: Tensor  # [tokens, hidden]
    places: Tensor  # [2, tokens] int64: positions, slots; -1 is padding
    batch: PagedBatch  # over `places`, each padded token a row of its own
    ramp: Tensor  # [2 * tokens + 1] int32: 0, 1, … up to tokens, then tokens

    @classmethod
    def empty(cls, tokens: int, context: int, page_tokens: int, hidden: Tensor) -> "Inputs":
        """Inputs that are all padding, for states like `hidden` [any, hidden] and pages of `page_tokens`."""
        device = hidden.device
        places = torch.full((2, tokens), -1, dtype=torch.int64, device=device)
        ramp = torch.arange(2 * tokens + 1, dtype=torch.int32, device=device).clamp_(max=tokens)
        tables = torch.zeros(tokens, -(-context // page_tokens), dtype=torch.int32, device=device)
        batch = PagedBatch(places[0], places[1], ramp[: tokens + 1].clone(), tables, context)
        return cls(hidden.new_zeros(tokens, hidden.shape[1]), places, batch, ramp)

    def fill(self, hidden: Tensor, batch: PagedBatch) -> None:
        """Take over a batch of no more tokens and no longer contexts; what is left over becomes padding."""
        tokens, rows, size = batch.tokens, batch.rows, self.hidden.shape[0]
        self.hidden[:tokens].copy_(hidden)
        if tokens < size:
            self.places[:, tokens:].fill_(-1)
        self.batch.positions[:tokens].copy_(batch.positions)
        self.batch.slots[:tokens].copy_(batch.slots)
        starts = self.batch.query_starts
        starts[: rows + 1].copy_(batch.query_starts)
        starts[rows + 1 :].copy_(self.ramp[tokens + 1 : tokens + 1 + size - rows])
        width = min(batch.page_tables.shape[1], self.batch.page_tables.shape[1])
        self.batch.page_tables[:rows, :width].copy_(batch.page_tables[:, :width])


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph, the inputs it reads and the state it leaves."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    out: Tensor  # [tokens, hidden]


class DecodeGraphs:
    """The captured passes of one decoder's blocks, made when a size is first met.

    All graphs share one pool of memory: they run one after the other, and what a graph leaves is copied at once.
    """

    def __init__(self, run_blocks: RunBlocks, most_context: int) -> None:
        """`most_context` tokens are the longest that a sequence may become: a graph's context never exceeds its
        `rounded_context`, for which rotary tables must be laid out before the first capture."""
        self._run_blocks = run_blocks
        self._most_context = rounded_context(most_context)
        self._told = False  # that no more graphs are captured
        self._pool: Any = None  # what `torch.cuda.graph_pool_handle` gives
        self._inputs: dict[tuple[int, int, int], Inputs] = {}
        self._graphs: dict[tuple[int, int, int, int, int], _Captured | None] = {}
        self._pages: dict[int, KVPages] = {}  # keeps the ids in the keys from being another's
        self._nbytes = 0

    @property
    def count(self) -> int:
        """Graphs captured so far."""
        return sum(captured is not None for captured in self._graphs.values())

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that captures took."""
        return self._nbytes

    def run(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> Tensor | None:
        """The state behind block `stop` - 1 of `hidden` [tokens, hidden] in front of block `start`; `hidden` stays.

        None where no graph fits: too many tokens, too many graphs, or a capture that failed.
        """
        tokens = next((size for size in TOKENS if size >= batch.tokens), None)
        if tokens is None or batch.tokens == 0 or batch.rows > tokens:
            return None
        context = rounded_context(batch.max_context)
        if context > self._most_context:
            return None
        key = (start, stop, tokens, context, id(pages))
        if key not in self._graphs:
            if not self._may_capture(hidden.device):
                return None
            self._pages[id(pages)] = pages
            self._graphs[key] = self._captured(hidden, pages, start, stop, tokens, context)
        captured = self._graphs[key]
        if captured is None:
            return None
        captured.inputs.fill(hidden, batch)
        captured.graph.replay()
        return captured.out[: batch.tokens].clone()

    def _may_capture(self, device: torch.device) -> bool:
        """Whether one more graph has a place; one warning says when that is over."""
        free, total = torch.cuda.mem_get_info(device)
        if self.count < MOST_GRAPHS and free >= SPARE_MEMORY * total:
            return True
        if not self._told:
            self._told = True
            _log.warning(
                "%d CUDA graphs are captured and %d of %d bytes are free: passes of sizes not yet met run without",
                self.count,
                free,
                total,
            )
        return False

    def _captured(
        self, hidden: Tensor, pages: KVPages, start: int, stop: int, tokens: int, context: int
    ) -> _Captured | None:
        """Capture a pass that is all padding; None, and a warning, where that fails, for want of memory most often."""
        before = torch.cuda.memory_reserved(hidden.device)
        try:
            with torch.inference_mode(), torch.cuda.device(hidden.device):
                captured = self._capture(hidden, pages, start, stop, tokens, context)
        except (
            RuntimeError
        ) as error:  # PyTorch's out of memory is one, the driver's and Triton's come as others
            _log.warning(
                "A CUDA graph of %d tokens and a context of %d cannot be captured, such passes run without: %s",
                tokens,
                context,
                str(error).split("\n", 1)[0],
            )
            return None
        self._nbytes += max(0, torch.cuda.memory_reserved(hidden.device) - before)
        return captured

    def _capture(
        self, hidden: Tensor, pages: KVPages, start: int, stop: int, tokens: int, context: int
    ) -> _Captured:
        page_tokens = pages.layout.page_tokens
        size = (tokens, context, page_tokens)
        inputs = self._inputs.get(size)
        if inputs is None:
            with torch.inference_mode(False):  # what is filled in any mode must be made outside of it
                inputs = self._inputs[size] = Inputs.empty(tokens, context, page_tokens, hidden)
        else:
            inputs.places.fill_(-1)
        current, side = torch.cuda.current_stream(hidden.device), torch.cuda.Stream(hidden.device)  # type: ignore[no-untyped-call] # torch does not annotate it
        side.wait_stream(current)
        with torch.cuda.stream(side):  # compiles what has not run yet, which a capture does not allow
            self._run_blocks(inputs.hidden.clone(), inputs.batch, pages, start, stop)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            out = self._run_blocks(inputs.hidden.clone(), inputs.batch, pages, start, stop)
        return _Captured(graph, inputs, out)


def rounded_context(context: int) -> int:
    """The context that a graph is captured for: attention's work follows each token's own, not this."""
    rounded = SHORTEST_CONTEXT
    while rounded < context:
        rounded *= 2
    return rounded
