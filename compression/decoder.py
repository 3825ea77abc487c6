"""The decoder: one implementation of every supported family that runs ranges of blocks over paged keys and values.

It keeps no state of any sequence: what a batch's tokens are and where their keys and values lie comes with each call
(`PagedBatch`, `KVPages`). Nothing here records gradients, the weights do not require them; a caller that loops should
stand in `torch.inference_mode()`, which saves a tenth of a small model's time per call.
"""

from pathlib import Path

import torch
from torch import Tensor

from exeunt.compression.architecture import Architecture
from exeunt.compression.block import Block, Rotation
from exeunt.compression.block_weights import read_block, read_embedding, read_output
from exeunt.compression.checkpoint import open_checkpoint
from exeunt.compression.embedding import Embedding
from exeunt.compression.exit_output import ExitOutput
from exeunt.compression.kv_format import KVPages
from exeunt.compression.kv_projection import KVProjection
from exeunt.compression.linear import FullLinear, Linear
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.native_blocks import native_blocks
from exeunt.compression.rope import RopeTables, rotate
from exeunt.compression.weights import WeightSource
from exeunt.kernels.blocks import NativeBlocks
from exeunt.kernels.paged_batch import PagedBatch
from exeunt.kernels.write_kv import write_kv


class BlockCalls:
    """How often each block was run, and over how many tokens: what the server's accounts are checked against.

    A block replaced by the linear block counts under its own number; `project_kv` runs no block.
    """

    __slots__ = ("calls", "tokens")

    def __init__(self, blocks: int) -> None:
        self.calls = [0] * blocks
        self.tokens = [0] * blocks


class Decoder:
    """A model's blocks with its embedding and head; `spec`, `device`, `dtype`, `linear_block` say what it is."""

    def __init__(
        self,
        spec: Architecture,
        embedding: Embedding,
        output: Linear,
        blocks: list[Block],
        rope: RopeTables | None,
        *,
        exit_output: Linear | None = None,
        linear_block: LinearBlock | None = None,
        kv_projection: KVProjection | None = None,
    ) -> None:
        """Put together from parts that are on one device; most callers want `load` or `from_weights`."""
        self.spec = spec
        self.device = embedding.tokens.device
        self.dtype = embedding.tokens.dtype
        self.linear_block = linear_block
        self.block_calls = BlockCalls(spec.blocks)
        self._embedding = embedding
        self._output = output
        self._project_exit = ExitOutput(exit_output or output, self.dtype)
        self._blocks = blocks
        self._rope = rope
        self._kv_projection = kv_projection or KVProjection(blocks)
        self._native: NativeBlocks | None = None
        self._described = False  # whether `_native` is known

    @classmethod
    def load(
        cls, model: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> "Decoder":
        """A checkpoint directory or Hugging Face id at full precision; `dtype` None is the checkpoint's own.

        Raises CheckpointError, ConfigError, UnsupportedModelError or WeightError.
        """
        checkpoint = open_checkpoint(model)
        own: torch.dtype = getattr(torch, checkpoint.spec.dtype)
        return cls.from_weights(checkpoint.spec, checkpoint.weights(), device=device, dtype=dtype or own)

    @classmethod
    def from_weights(
        cls,
        spec: Architecture,
        weights: WeightSource,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype,
        int4_group_size: int | None = None,
        share_with: "Decoder | None" = None,
    ) -> "Decoder":
        """From tensors under canonical names (`exeunt.compression.checkpoint_names`), a block at a time.

        With `int4_group_size` the linears are built from `.codes`, `.scales` and `.offsets`, and no `.weight` of a
        block is read; the output matrix too, where it is held so. With `share_with`, a decoder of the same model on
        the same device, embedding, norms, biases and an output matrix in full precision are that decoder's own tensors
        rather than read again. Raises WeightError.
        """
        place, shared = torch.device(device), weights.shared()
        if share_with is not None:
            embedding, rope = share_with._embedding, share_with._rope
        else:
            embedding = read_embedding(spec, shared, place, dtype)
            rope = RopeTables(spec.rope, place, dtype) if spec.rope is not None else None
        output = read_output(
            spec,
            shared,
            embedding,
            place,
            dtype,
            int4_group_size=int4_group_size,
            twin=share_with._output if share_with is not None else None,
        )
        blocks = [
            read_block(
                spec,
                index,
                weights.block(index),
                place,
                dtype,
                int4_group_size=int4_group_size,
                twin=share_with._blocks[index] if share_with is not None else None,
            )
            for index in range(spec.blocks)
        ]
        return cls(spec, embedding, output, blocks, rope)

    def with_linear_block(self, linear_block: LinearBlock) -> "Decoder":
        """This decoder with block `linear_block.index` replaced by the linear map; all weights are shared."""
        if not 0 <= linear_block.index < self.spec.blocks:
            raise ValueError(
                f"There is no block {linear_block.index} to replace; the model has {self.spec.blocks}."
            )
        return Decoder(
            self.spec,
            self._embedding,
            self._output,
            self._blocks,
            self._rope,
            exit_output=self._project_exit.linear,
            linear_block=linear_block,
            kv_projection=self._kv_projection,
        )

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """The state in front of block 0, [tokens, hidden], of int64 token ids and positions [tokens]."""
        return self._embedding.embed(token_ids, positions)

    def run_blocks(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> Tensor:
        """The state behind block `stop` - 1 of the state `hidden` [tokens, hidden] in front of block `start`.

        Writes the keys and values of every block passed. `hidden` is left as it is.
        """
        if start >= stop:
            return hidden
        hidden = hidden.clone()  # the blocks add in place, and the caller may keep its state for a backfill
        native, places = self._native_blocks(), pages.native(start, stop)
        if native is not None and places is not None and native.takes(places):
            native.run(hidden, batch, places, self._rotation_table(batch), start)
        else:
            hidden = self._run_blocks(hidden, batch, pages, start, stop)
        tokens, calls = hidden.shape[0], self.block_calls
        for index in range(start, stop):
            calls.calls[index] += 1
            calls.tokens[index] += tokens
        return hidden

    def project_kv(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> None:
        """Write the keys and values that blocks `start` to `stop` - 1 make of the exit state `hidden`.

        `hidden` [tokens, hidden] is the state behind block `start` - 1, of which every skipped block is given the
        same. One native call on a CPU; elsewhere full-precision blocks go as one stacked matrix (see KVProjection).
        """
        native, places = self._native_blocks(), pages.native(start, stop)
        if native is not None and places is not None and native.takes(places):
            native.project_kv(hidden.contiguous(), batch, places, self._rotation_table(batch), start)
        else:
            self._project_kv(hidden, batch, pages, start, stop)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The state that the output matrix reads, [tokens, hidden]."""
        return self._embedding.final_norm(hidden)

    def project(self, state: Tensor) -> Tensor:
        """Logits [tokens, vocab] float32 of a state that has been through `final_norm` (or an exit's head)."""
        return self._output(state).float()

    @property
    def output(self) -> Linear:
        """The output matrix."""
        return self._output

    def let_exits_read(self, output: Linear) -> None:
        """Have exits project with another form of the output matrix than the model's own head.

        An exit's projection is asked of many tokens that do not leave in the end; in INT4 it costs a quarter or less.
        """
        self._project_exit = ExitOutput(output, self.dtype)

    @property
    def project_exit(self) -> ExitOutput:
        """Maps an exit's state to its logits [tokens, vocab] float32: `project` by what `let_exits_read` was given."""
        return self._project_exit

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [tokens, vocab] float32 of the state behind the last block."""
        return self.project(self.final_norm(hidden))

    def resident_bytes(self) -> dict[str, int]:
        """Bytes held, by kind: embedding, full, int4 (linears; the output matrix, unless it is the embedding itself,
        among them), norms (with biases), kv_projection, exit_output (where exits read another form), rope,
        linear_block. Tensors that another decoder shares count in both."""
        sizes = {
            "embedding": self._embedding.nbytes,
            "full": 0,
            "int4": 0,
            "norms": self._embedding.final_norm.nbytes,
        }
        if not (isinstance(self._output, FullLinear) and self._output.weight is self._embedding.tokens):
            sizes[self._output.format] += self._output.nbytes
        for block in self._blocks:
            for kind, size in block.nbytes().items():
                sizes[kind] += size
        sizes["kv_projection"] = self._kv_projection.nbytes
        sizes["exit_output"] = (
            self._project_exit.linear.nbytes if self._project_exit.linear is not self._output else 0
        )
        sizes["rope"] = self._rope.nbytes if self._rope is not None else 0
        sizes["linear_block"] = self.linear_block.nbytes if self.linear_block is not None else 0
        return sizes

    def _native_blocks(self) -> NativeBlocks | None:
        """The blocks for the native kernel, described when they are first asked for."""
        if not self._described:
            self._native = native_blocks(self.spec, self._blocks, self.linear_block, self.device, self.dtype)
            self._described = True
        return self._native

    def _run_blocks(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> Tensor:
        """`run_blocks` one operation at a time, in place."""
        rotation = self._rotation(batch)
        linear_block = self.linear_block
        for index in range(start, stop):
            if linear_block is not None and linear_block.index == index:
                hidden = linear_block.apply(hidden)
            else:
                hidden = self._blocks[index].run(hidden, rotation, batch, pages.block(index))
        return hidden

    def _project_kv(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> None:
        """`project_kv` without the native kernel: full-precision blocks as one stacked matrix, INT4 ones each."""
        rotation = self._rotation(batch)
        for first, last in self._runs(start, stop):
            if self._kv_projection.applies(first, last):
                self._project_stacked(hidden, rotation, batch, pages, first, last)
            else:
                for index in range(first, last):
                    self._blocks[index].project_kv(hidden, rotation, batch.slots, pages.block(index))

    def _rotation_table(self, batch: PagedBatch) -> Tensor | None:
        return self._rope.table(batch.max_context) if self._rope is not None else None

    def _rotation(self, batch: PagedBatch) -> Rotation:
        return self._rope.at(batch.positions, batch.max_context) if self._rope is not None else None

    def _runs(self, start: int, stop: int) -> list[tuple[int, int]]:
        """`start` to `stop` as ranges without the linear block, which has no keys and values."""
        if self.linear_block is None or not start <= self.linear_block.index < stop:
            ranges = [(start, stop)]
        else:
            ranges = [(start, self.linear_block.index), (self.linear_block.index + 1, stop)]
        return [(first, last) for first, last in ranges if first < last]

    def _project_stacked(
        self, hidden: Tensor, rotation: Rotation, batch: PagedBatch, pages: KVPages, start: int, stop: int
    ) -> None:
        keys, values = self._kv_projection(hidden, start, stop)
        if rotation is not None:
            cosines, sines = rotation
            keys = rotate(keys, cosines.unsqueeze(1), sines.unsqueeze(1))
        for offset in range(stop - start):
            write_kv(keys[:, offset], values[:, offset], batch.slots, pages.block(start + offset))
