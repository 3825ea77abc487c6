"""A decode step in one native call: all blocks, the exits on the way, and the model's own head.

Called stage by stage a small model spends as long between the calls as it saves by the blocks that are skipped. The
reference is what `exeunt.server.runner` does a stage at a time, with `NativeBlocks`, `exit_gate` and the head; a token
has the same bits either way.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exeunt.kernels.blocks import NativeBlocks, PageRange
from exeunt.kernels.exit_gate import MOST_LOGITS, NativeGate
from exeunt.kernels.native.descriptors import Matrix
from exeunt.kernels.native.library import DTYPE_CODES
from exeunt.kernels.paged_batch import PagedBatch

_pointer, _long = ctypes.c_void_p, ctypes.c_int64


class _Exit(ctypes.Structure):
    """`struct PassExit` of kernels/native/decode_pass.h."""

    _fields_ = (("gate", _pointer), ("thresholds", _pointer), ("depth", _long))


class _Head(ctypes.Structure):
    """`struct PassHead`; all zeros is none."""

    _fields_ = (("norm", _pointer), ("output", Matrix))


class _Result(ctypes.Structure):
    """`struct PassResult`."""

    _fields_ = tuple(
        (name, _pointer) for name in ("logits", "states", "order", "left", "gated", "seconds", "gate_seconds")
    )


@dataclass(frozen=True, slots=True)
class Passed:
    """What became of T tokens: those that left at the first exit that was asked, at the second, then those that stayed.

    Within each in the batch's order. `seconds` are those from the exit before to behind this one, and of them
    `gate_seconds` were the gate's, which `gated` tokens asked.
    """

    order: list[int]  # [T] which token of the batch
    left: list[int]  # how many left at each exit that was asked
    gated: list[int]
    seconds: list[float]
    gate_seconds: list[float]
    logits: Tensor  # [T, vocab] float32; without a head those of tokens that stayed are not set
    states: Tensor  # [T, hidden] at their exit, or behind the last block

    @property
    def stayed(self) -> int:
        """How many passed all blocks."""
        return len(self.order) - sum(self.left)


@dataclass(frozen=True, slots=True)
class NativePass:
    """All blocks of a decoder with some exits; described once, run for every step.

    `head` are the weight [hidden] of an RMS norm, in the blocks' dtype, and the output matrix; None where the model's
    head is of another kind, and the caller's business. Raises ValueError where parts do not fit each other.
    """

    blocks: NativeBlocks
    exits: tuple[tuple[int, NativeGate], ...]  # blocks in front of each, ascending, and its gate
    head: tuple[Tensor, Matrix] | None
    vocab: int

    def __post_init__(self) -> None:
        hidden, dtype = self.blocks.shape.hidden, self.blocks.dtype
        depths = [depth for depth, _ in self.exits]
        if depths != sorted(set(depths)) or not all(0 < depth < len(self.blocks.parts) for depth in depths):
            raise ValueError(f"exits stand behind {depths} of {len(self.blocks.parts)} blocks")
        for _, gate in self.exits:
            if (gate.size, gate.dtype, gate.outputs) != (hidden, dtype, self.vocab):
                raise ValueError(
                    f"a gate takes {gate.size} {gate.dtype} and gives {gate.outputs} logits, expected {hidden} "
                    f"{dtype} and {self.vocab}"
                )
        if self.head is not None:
            norm, output = self.head
            sizes = (list(norm.shape), output.inputs, output.outputs)
            if sizes != ([hidden], hidden, self.vocab) or norm.dtype != dtype or not norm.is_contiguous():
                raise ValueError(f"the head is {sizes} {norm.dtype}, expected {[hidden], hidden, self.vocab}")

    def takes(self, tokens: int) -> bool:
        """Whether there is room for the logits of so many."""
        return tokens * self.vocab <= MOST_LOGITS

    def run(
        self,
        hidden: Tensor,
        batch: PagedBatch,
        pages: PageRange,
        rotation: Tensor | None,
        asked: Sequence[int],
        thresholds: Tensor,
    ) -> Passed:
        """Run all blocks over `hidden` [T, hidden], dense, which is lost; each token is a row of its own.

        `asked` names the exits that are asked, ascending, and `thresholds` [T] float32 the confidence that each token
        needs to leave at one of them, infinity for those that may not. A token that leaves gets the keys and values of
        the blocks that it skips. Raises ValueError where shapes do not fit, and for more tokens than it `takes`.
        """
        self._check(hidden.shape[0], batch, pages, asked, thresholds)
        self.blocks.check(hidden, batch, pages, rotation, 0)
        thresholds = thresholds.contiguous()
        tokens, count, blocks = hidden.shape[0], len(asked), self.blocks
        exits = (_Exit * count)()
        for place, of in zip(asked, exits, strict=True):
            depth, gate = self.exits[place]
            of.gate, of.thresholds, of.depth = gate.address, thresholds.data_ptr(), depth
        head = _Head() if self.head is None else _Head(self.head[0].data_ptr(), self.head[1])
        logits, states = torch.empty(tokens, self.vocab), torch.empty_like(hidden)
        order, scratch = torch.empty(tokens, dtype=torch.int64), blocks.scratch(tokens)
        left, gated = (_long * count)(), (_long * count)()
        seconds, gate_seconds = (ctypes.c_double * count)(), (ctypes.c_double * count)()
        result = _Result(
            *(each.data_ptr() for each in (logits, states, order)),
            *(ctypes.addressof(each) for each in (left, gated, seconds, gate_seconds)),
        )
        blocks.library.decode_pass(
            *blocks.arguments(hidden, batch, pages, rotation, 0, scratch),
            ctypes.addressof(exits),
            count,
            ctypes.addressof(head),
            ctypes.addressof(result),
            DTYPE_CODES[blocks.dtype],
            torch.get_num_threads(),
        )
        return Passed(
            order.tolist(), list(left), list(gated), list(seconds), list(gate_seconds), logits, states
        )

    def _check(
        self, tokens: int, batch: PagedBatch, pages: PageRange, asked: Sequence[int], thresholds: Tensor
    ) -> None:
        """Raise ValueError where what comes with so many tokens does not fit them, or the pass."""
        if not self.takes(tokens):
            raise ValueError(f"{tokens} tokens of {self.vocab} logits were given, room is for {MOST_LOGITS}")
        if batch.rows != tokens or thresholds.shape != (tokens,) or thresholds.dtype != torch.float32:
            raise ValueError(
                f"{batch.rows} rows and thresholds {list(thresholds.shape)} {thresholds.dtype} were given for {tokens} "
                "tokens, expected one row and one float32 threshold each"
            )
        if not batch.page_tables.is_contiguous():
            raise ValueError("the page tables are not dense")
        known = len(self.exits)
        if list(asked) != sorted(set(asked)) or not all(0 <= place < known for place in asked):
            raise ValueError(f"exits {list(asked)} were asked of {known}, expected some of them, ascending")
        count, wanted = len(pages.described), len(self.blocks.parts)
        if count != wanted:
            raise ValueError(f"pages of {count} blocks were given, the pass has {wanted}")
