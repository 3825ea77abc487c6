"""A pass through a whole model in one native call: all blocks, the exits on the way, and the model's own head.

Called stage by stage a small model spends as long between the calls as it saves by the blocks that are skipped. The
reference is what `exeunt.server.runner` does a stage at a time, with `NativeBlocks`, `exit_gate` and the head; a token
has the same bits either way.
"""

import ctypes
from dataclasses import dataclass, field

import torch
from torch import Tensor

from exeunt.kernels.blocks import TILE_TOKENS, NativeBlocks, PageRange
from exeunt.kernels.decode_pass.batch import PassBatch
from exeunt.kernels.exit_gate import MOST_LOGITS, NativeGate
from exeunt.kernels.native.descriptors import Matrix
from exeunt.kernels.native.library import DTYPE_CODES

_pointer, _long = ctypes.c_void_p, ctypes.c_int64


class _Exit(ctypes.Structure):
    """`struct PassExit` of kernels/native/decode_pass.h."""

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
        ("widest", _long),
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


@dataclass(frozen=True, slots=True)
class Passed:
    """What became of T tokens on their way past E exits.

    Stage e is what lies in front of exit e, stage E what lies behind the last.
    """

    told: list[int]  # which token each row of logits is of
    stopped: list[int]  # [T] behind which exit; E: behind the last block; -1: it never came in
    tokens: list[int]  # [E + 1] that were on their way in each stage
    rows: list[int]  # [E + 1]
    spoke: list[int]  # [E + 1] rows of logits that are the exits', in their order; the last: the head's
    asked: list[int]  # [E] tokens that each gate was asked about
    cut: list[int]  # [E] 1 where a token might have left, or did come in, else 0
    seconds: list[float]  # [E] from the exit before to behind this one
    gate_seconds: list[float]  # [E] of them in the gate
    logits: Tensor  # [told, vocab] float32; without a head its own rows are not set
    states: Tensor  # [T, hidden] where each stopped
    drawn: (
        tuple[list[int], list[float]] | None
    )  # ids and log-probabilities [told], NaN where logits are not usable


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
        for table in self.embedding:
            if table is not None and (
                table.dtype != dtype or table.shape[1:] != (hidden,) or not table.is_contiguous()
            ):
                raise ValueError(
                    f"an embedding is {list(table.shape)} {table.dtype}, expected dense [any, {hidden}] {dtype}"
                )
        exits = (_Exit * len(self.exits))(*(_Exit(gate.address, depth) for depth, gate in self.exits))
        head = _Head() if self.head is None else _Head(self.head[0].data_ptr(), self.head[1])
        blocks = self.blocks
        of_tokens, of_places = self.embedding
        places = (None, 0) if of_places is None else (of_places.data_ptr(), len(of_places))
        model = _Model(
            _Embedding(of_tokens.data_ptr(), places[0], len(of_tokens), places[1]),
            ctypes.addressof(blocks.shape),
            ctypes.addressof(blocks.parts),
            len(blocks.parts),
            blocks.widest,
            ctypes.addressof(exits),
            len(self.exits),
            head,
        )
        object.__setattr__(self, "_exits", exits)
        object.__setattr__(self, "_model", model)

    def takes(self, batch: PassBatch) -> bool:
        """Whether there is room for the logits of all tokens that may be heard."""
        return batch.most_told * self.vocab <= MOST_LOGITS

    def run(self, states: Tensor, batch: PassBatch, pages: PageRange, rotation: Tensor | None) -> Passed:
        """Take tokens through all blocks, from their embedding or, those that wait, from `states` to where they stop.

        `states` [T, hidden], dense, is overwritten; those of tokens that never come in stay. A token that leaves for
        good gets the keys and values of the blocks that it skips. Where the batch draws and the head is known, the
        successors of all tokens with logits are drawn too (see `draw_tokens`). `rotation` is that of
        `NativeBlocks.run`, and as there the values of positions, slots and pages are not looked at. Raises ValueError
        where shapes do not fit, where the batch names exits or ids that there are not, and for more logits than it
        `takes`.
        """
        self._check(states, batch, pages, rotation)
        tokens, exits, blocks = batch.tokens, len(self.exits), self.blocks
        logits = torch.empty(batch.most_told, self.vocab)
        counts = (_long * (3 * tokens + 5 * exits + 3))()
        logprobs = (ctypes.c_float * tokens)()
        seconds = (ctypes.c_double * (2 * exits))()
        result = _Result(
            states.data_ptr(),
            logits.data_ptr(),
            ctypes.addressof(counts),
            ctypes.addressof(logprobs),
            ctypes.addressof(seconds),
            tokens,
            exits,
        )
        known = blocks.library.decode_pass(
            ctypes.addressof(self._model),
            pages.addresses,
            None if rotation is None else rotation.data_ptr(),
            batch.address,
            ctypes.addressof(result),
            TILE_TOKENS,
            DTYPE_CODES[blocks.dtype],
            torch.get_num_threads(),
        )
        if not known:
            raise ValueError(f"the {tokens} tokens of a pass name exits or actions that it does not know")
        stages, after = exits + 1, 2 * tokens + 3 * (exits + 1)
        by_stage = counts[2 * tokens : after]
        spoke = by_stage[2 * stages :]
        told, end = sum(spoke), after + 2 * exits
        drawn = (counts[end : end + told], logprobs[:told]) if batch.draws and self.head is not None else None
        return Passed(
            told=counts[:told],
            stopped=counts[tokens : 2 * tokens],
            tokens=by_stage[:stages],
            rows=by_stage[stages : 2 * stages],
            spoke=spoke,
            asked=counts[after : after + exits],
            cut=counts[after + exits : end],
            seconds=seconds[:exits],
            gate_seconds=seconds[exits:],
            logits=logits[:told],
            states=states,
            drawn=drawn,
        )

    def _check(self, states: Tensor, batch: PassBatch, pages: PageRange, rotation: Tensor | None) -> None:
        """Raise ValueError where what is given does not fit together, or the pass."""
        if not self.takes(batch):
            raise ValueError(
                f"logits of {batch.most_told} tokens were asked for, {self.vocab} each, room is for {MOST_LOGITS}"
            )
        self.blocks.check_operands(states, batch.tokens, batch.max_context, pages, rotation, 0)
        count, wanted = len(pages.described), len(self.blocks.parts)
        if count != wanted:
            raise ValueError(f"pages of {count} blocks were given, the pass has {wanted}")
