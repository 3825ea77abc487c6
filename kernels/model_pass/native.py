"""A pass through a whole model in one native call: embedding, blocks, the exits on the way, head and draws.

Called stage by stage a small model spends as long between the calls as it saves by the blocks that are skipped. The
reference strings the operations together a stage at a time (tests/compression/staged_pass.py, and the server's way on
other devices); a token has the same bits either way.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor

from exeunt.kernels.blocks import TILE_TOKENS, NativeBlocks, PageRange
from exeunt.kernels.exit_gate import MOST_LOGITS, NativeGate
from exeunt.kernels.model_pass.batch import PassBatch
from exeunt.kernels.native.descriptors import Matrix
from exeunt.kernels.native.library import DTYPE_CODES

_pointer, _long = ctypes.c_void_p, ctypes.c_int64

MOST_EXITS: Final = 62
"""Which exits a token asks is one number of 64 bits, with a sign, and shifted by how many there are."""

_FAULTS = {
    1: "a row without a token",
    2: "a place to come in at that is no exit's",
    3: "an exit to be asked that there is not",
    4: "a token id outside the vocabulary",
    5: "a position past the learned ones",
    6: "a row that begins at no exit's place",
    7: "an action at exits that there is not",
}
"""By what `PassBatch::fault` of kernels/native/model_pass.h returns."""


class _Exit(ctypes.Structure):
    """`struct PassExit` of kernels/native/model_pass.h."""

    _fields_ = (("gate", _pointer), ("depth", _long))


class _Head(ctypes.Structure):
    """`struct PassHead`; all zeros is none."""

    _fields_ = (("norm", _pointer), ("output", Matrix))


class _Embedding(ctypes.Structure):
    """`struct PassEmbedding`."""

    _fields_ = (("tokens", _pointer), ("positions", _pointer), ("ids", _long), ("most", _long))


class _Model(ctypes.Structure):
    """`struct PassModel`."""

    _fields_ = (
        ("embedding", _Embedding),
        ("shape", _pointer),
        ("blocks", _pointer),
        ("count", _long),
        ("exits", _pointer),
        ("exit_count", _long),
        ("head", _Head),
    )


class _Result(ctypes.Structure):
    """`struct PassResult`."""

    _fields_ = (
        *((name, _pointer) for name in ("states", "logits", "counts", "logprobs", "seconds")),
        ("all_tokens", _long),
        ("exits", _long),
    )


@dataclass(slots=True)
class PassOutcome:
    """Where T tokens went on their way past E exits.

    Stage e is what lies in front of exit e, stage E what lies behind the last. `logits` [L, vocab] float32 are of those
    tokens that left at the first exit, at the second, then of those the head was asked about.
    """

    with_logits: list[int]  # [L] which token each row of logits is of
    stopped: list[int]  # [T] behind which exit; E: behind the last block; -1: it never came in
    tokens: list[int]  # [E + 1] that were on their way in each stage
    rows: list[int]  # [E + 1] the same of rows
    logits_of: list[int]  # [E + 1] rows of logits of each exit, then of the head
    logits: Tensor
    states: Tensor  # [T, hidden] where each stopped


@dataclass(slots=True)
class Passed(PassOutcome):
    """What else is known of a native call: without a head the logits behind the last block are not set.

    `drawn` are the ids and log-probabilities [L] of successors, NaN where logits are not usable; None where nothing was
    drawn.
    """

    gated: list[int]  # [E] tokens that each gate was asked about
    ends_piece: list[int]  # [E] 1 where a token might have left, or did come in, else 0
    seconds: list[float]  # [E + 1] of each stage, its gate, or the head and all draws, included
    gate_seconds: list[float]  # [E] of them in the gate
    drawn: tuple[list[int], list[float]] | None


@dataclass(frozen=True, slots=True)
class NativePass:
    """All blocks of a decoder with some exits; described once, run for every tick.

    `embedding` are the tensors [vocab, hidden] of tokens and [most, hidden] of learned positions, None for others.
    `head` are the weight [hidden] of an RMS norm, in the blocks' dtype, and the output matrix; None where the model's
    head is of another kind, and the caller's business. Raises ValueError where parts do not fit each other.
    """

    embedding: tuple[Tensor, Tensor | None]
    blocks: NativeBlocks
    exits: tuple[tuple[int, NativeGate], ...]  # blocks in front of each, ascending, and its gate
    head: tuple[Tensor, Matrix] | None
    vocab: int
    _model: _Model = field(init=False, repr=False)
    _exits: "ctypes.Array[_Exit]" = field(init=False, repr=False)  # what it points to

    def __post_init__(self) -> None:
        self._check_exits()
        self._check_ends()
        blocks = self.blocks
        exits = (_Exit * len(self.exits))(*(_Exit(gate.address, depth) for depth, gate in self.exits))
        of_tokens, of_places = self.embedding
        places = (None, 0) if of_places is None else (of_places.data_ptr(), len(of_places))
        model = _Model(
            _Embedding(of_tokens.data_ptr(), places[0], len(of_tokens), places[1]),
            ctypes.addressof(blocks.shape),
            ctypes.addressof(blocks.parts),
            len(blocks.parts),
            ctypes.addressof(exits),
            len(self.exits),
            _Head() if self.head is None else _Head(self.head[0].data_ptr(), self.head[1]),
        )
        object.__setattr__(self, "_exits", exits)
        object.__setattr__(self, "_model", model)

    def takes(self, batch: PassBatch) -> bool:
        """Whether there is room for the logits of all tokens that may get some."""
        return batch.most_logits * self.vocab <= MOST_LOGITS

    def run(self, states: Tensor, batch: PassBatch, pages: PageRange, rotation: Tensor | None) -> Passed:
        """Take tokens through all blocks, from their embedding or, those that wait, from `states` to where they stop.

        `states` [T, hidden], dense, is overwritten; those of tokens that never come in stay. A token that leaves for
        good gets the keys and values of the blocks that it skips. Where the batch has token keys and the head is known,
        the successors of all tokens with logits are drawn too (see `draw_tokens`). `rotation` is that of
        `NativeBlocks.run`; as there slots and pages are not looked at, nor positions where none are learned. Raises
        ValueError where shapes do not fit, where the batch names an exit, an id or a position that there is not, and
        for more logits than it `takes`, MemoryError where memory is out.
        """
        self._check(states, batch, pages, rotation)
        tokens, exits = batch.token_count, len(self.exits)
        logits = torch.empty(batch.most_logits, self.vocab)
        sizes = (tokens, tokens, exits + 1, exits + 1, exits + 1, exits, exits, tokens)
        counts = (_long * sum(sizes))()
        logprobs, seconds = (ctypes.c_float * tokens)(), (ctypes.c_double * (2 * exits + 1))()
        result = _Result(
            states.data_ptr(),
            logits.data_ptr(),
            *(ctypes.addressof(counts), ctypes.addressof(logprobs), ctypes.addressof(seconds)),
            tokens,
            exits,
        )
        fault = self.blocks.library.model_pass(
            ctypes.addressof(self._model),
            pages.addresses,
            None if rotation is None else rotation.data_ptr(),
            batch.address,
            ctypes.addressof(result),
            TILE_TOKENS,
            DTYPE_CODES[self.blocks.dtype],
            torch.get_num_threads(),
        )
        if fault < 0:
            raise MemoryError(f"there is no memory for what a pass of {tokens} tokens holds on its way")
        if fault:
            raise ValueError(f"a pass of {tokens} tokens names {_FAULTS[fault]}")
        with_logits, stopped, of_stages, rows, logits_of, gated, ends, ids = _parted(counts[:], sizes)
        told = sum(logits_of)
        drawn = None if batch.token_keys is None or self.head is None else (ids[:told], logprobs[:told])
        return Passed(
            with_logits[:told],
            stopped,
            of_stages,
            rows,
            logits_of,
            logits[:told],
            states,
            gated,
            ends,
            seconds[: exits + 1],
            seconds[exits + 1 :],
            drawn,
        )

    def _check_exits(self) -> None:
        """Raise ValueError where exits do not fit the blocks or the vocabulary."""
        hidden, dtype = self.blocks.shape.hidden, self.blocks.dtype
        depths = [depth for depth, _ in self.exits]
        if len(depths) > MOST_EXITS:
            raise ValueError(f"{len(depths)} exits were given, a pass takes {MOST_EXITS}")
        if depths != sorted(set(depths)) or not all(0 < depth < len(self.blocks.parts) for depth in depths):
            raise ValueError(f"exits stand behind {depths} of {len(self.blocks.parts)} blocks")
        for _, gate in self.exits:
            if (gate.size, gate.dtype, gate.outputs) != (hidden, dtype, self.vocab):
                raise ValueError(
                    f"a gate takes {gate.size} {gate.dtype} and gives {gate.outputs} logits, expected {hidden} "
                    f"{dtype} and {self.vocab}"
                )

    def _check_ends(self) -> None:
        """Raise ValueError where embedding or head do not fit the blocks."""
        hidden, dtype = self.blocks.shape.hidden, self.blocks.dtype
        if self.head is not None:
            norm, output = self.head
            sizes = (list(norm.shape), output.inputs, output.outputs)
            if sizes != ([hidden], hidden, self.vocab) or norm.dtype != dtype or not norm.is_contiguous():
                raise ValueError(f"the head is {sizes} {norm.dtype}, expected {[hidden], hidden, self.vocab}")
        for table in self.embedding:
            if table is None:
                continue
            if table.dtype != dtype or table.shape[1:] != (hidden,) or not table.is_contiguous():
                raise ValueError(
                    f"an embedding is {list(table.shape)} {table.dtype}, expected dense [any, {hidden}] {dtype}"
                )

    def _check(self, states: Tensor, batch: PassBatch, pages: PageRange, rotation: Tensor | None) -> None:
        """Raise ValueError where what is given does not fit together, or the pass."""
        if not self.takes(batch):
            raise ValueError(
                f"logits of {batch.most_logits} tokens were asked for, {self.vocab} each, room is for {MOST_LOGITS}"
            )
        keys = batch.token_keys
        if keys is not None and keys.shape != (self.vocab,):
            raise ValueError(f"token keys are {list(keys.shape)}, expected [{self.vocab}]")
        self.blocks.check_operands(states, batch.token_count, batch.max_context, pages, rotation, 0)
        count, wanted = len(pages.described), len(self.blocks.parts)
        if count != wanted:
            raise ValueError(f"pages of {count} blocks were given, the pass has {wanted}")


def _parted(numbers: list[int], sizes: Sequence[int]) -> list[list[int]]:
    """The numbers cut into parts of these sizes: those of `PassResult`, in its order."""
    return [numbers[end - size : end] for end, size in zip(accumulate(sizes), sizes, strict=True)]
