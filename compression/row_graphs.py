"""Row-wise functions on a GPU as captured CUDA graphs: heads, gates and draws in one launch each.

A function is row-wise where it maps tensors whose first dimension is rows to tensors whose first dimension is those
rows, and no row's result depends on the rows beside it. So a call of n rows may run as one of more: the rows behind the
n hold whatever they held before, and nobody reads what becomes of them. The kernels are row-invariant: the n rows'
results are those of a call without a graph, to the bit.
"""

from collections.abc import Callable, Hashable
from typing import Final

import torch
from torch import Tensor

from exeunt.compression.graph_pool import ROWS, Captured, GraphPool, size_for

MOST_ROW_GRAPHS: Final = 192
"""Graphs of all row-wise functions together: beyond it calls of sizes not yet met run without."""

RowFunction = Callable[..., tuple[Tensor, ...]]
"""Tensors [rows, …] of tensors [rows, …]; it may wait for nothing, so that a graph can hold it."""


class RowGraphs:
    """One row-wise function, captured for a number of rows when a call first needs it.

    Graphs of all sizes read and leave the first rows of the same tensors.
    """

    def __init__(self, name: str, function: RowFunction, pool: GraphPool, outputs: "SharedOutputs") -> None:
        """`outputs` are shared with functions whose results nobody reads any more when this one runs."""
        self._name, self._function, self._pool, self._outputs = name, function, pool, outputs
        self._inputs: tuple[Tensor, ...] = ()
        self._results: tuple[Tensor, ...] = ()
        self._graphs: dict[int, Captured[None] | None] = {}

    @property
    def count(self) -> int:
        """Graphs captured so far."""
        return sum(captured is not None for captured in self._graphs.values())

    def run(self, *rows: Tensor, may_capture: Callable[[], bool]) -> tuple[Tensor, ...] | None:
        """What the function makes of `rows`, tensors [n, …] on the pool's device or the host, pinned there.

        None where no graph fits: too many rows, no room, or a capture that failed. The tensors belong to the graphs:
        they hold until any function runs with the same outputs, and whoever needs them longer copies them.
        """
        count = rows[0].shape[0]
        size = size_for(count, ROWS)
        if size is None:
            return None
        if size not in self._graphs:
            if not may_capture():
                return None
            self._graphs[size] = self._captured(rows, size)
        captured = self._graphs[size]
        if captured is None:
            return None
        for kept, given in zip(self._inputs, rows, strict=True):
            kept[:count].copy_(given, non_blocking=True)
        captured.replay()
        return tuple(result[:count] for result in self._results)

    def _captured(self, rows: tuple[Tensor, ...], size: int) -> Captured[None] | None:
        name = f"{self._name} of {size} rows"
        return self._pool.capture(name, lambda: self._make_inputs(rows), lambda: self._run(size))

    def _make_inputs(self, rows: tuple[Tensor, ...]) -> None:
        """Room for as many rows as a graph may have; `rows` say of what shape and dtype."""
        if self._inputs:
            return
        with torch.inference_mode(False):  # what is filled in any mode must be made outside of it
            self._inputs = tuple(
                torch.zeros(ROWS[-1], *each.shape[1:], dtype=each.dtype, device=self._pool.device)
                for each in rows
            )
        self._pool.note(sum(each.nbytes for each in self._inputs))

    def _run(self, size: int) -> None:
        """The function over the first `size` rows of the inputs, its results in the first rows of the outputs."""
        found = self._function(*(each[:size] for each in self._inputs))
        if not self._results:  # in the run that compiles: a capture finds them made
            self._results = self._outputs.like(found)
        for kept, result in zip(self._results, found, strict=True):
            kept[:size].copy_(result)


class SharedOutputs:
    """Tensors that captured functions leave their results in, one for each place, shape and dtype.

    Each graph that kept results of its own would keep them for itself: of logits that is much.
    """

    def __init__(self, pool: GraphPool, rows: int = ROWS[-1]) -> None:
        """`rows` are the most that a result may have."""
        self._pool, self._rows = pool, rows
        self._tensors: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}

    def like(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """For results [rows, …] one tensor [most rows, …] each."""
        return tuple(self._tensor(place, result) for place, result in enumerate(results))

    def _tensor(self, place: int, result: Tensor) -> Tensor:
        key = (place, result.shape[1:], result.dtype)
        found = self._tensors.get(key)
        if found is None:
            with torch.inference_mode(False):
                found = torch.zeros(self._rows, *key[1], dtype=result.dtype, device=result.device)
            self._tensors[key] = found
            self._pool.note(found.nbytes)
        return found


class StepGraphs:
    """The graphs of a server's steps, whatever they hold: the pool, and the row-wise functions that run in it.

    Decoders that share it share graphs of what they have in common.
    """

    def __init__(self, pool: GraphPool) -> None:
        self.pool = pool
        self.outputs = SharedOutputs(pool)
        self._functions: dict[Hashable, RowGraphs] = {}

    @property
    def count(self) -> int:
        """Graphs of row-wise functions captured so far."""
        return sum(graphs.count for graphs in self._functions.values())

    def run(
        self, key: tuple[str, *tuple[Hashable, ...]], function: RowFunction, *rows: Tensor
    ) -> tuple[Tensor, ...] | None:
        """`RowGraphs.run` of the function known by `key`, a name and what tells it from others of that name.

        The function that came with a key first is kept, and with it what it reads: ids of that may be in the key.
        What comes back holds until the next call.
        """
        graphs = self._functions.get(key)
        if graphs is None:
            graphs = self._functions[key] = RowGraphs(key[0], function, self.pool, self.outputs)
        return graphs.run(*rows, may_capture=self._may_capture)

    def release(self) -> None:
        """Let go of all row-wise functions, their graphs and tensors; a later call captures anew.

        Decoders that share these graphs let go of their own, which share the outputs, with them.
        """
        self._functions.clear()
        self.outputs = SharedOutputs(self.pool)
        self.pool.forget()

    def _may_capture(self) -> bool:
        return self.pool.may_capture(self.count, MOST_ROW_GRAPHS)
