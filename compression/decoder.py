"""The decoder: one implementation of every supported family that runs ranges of blocks over paged keys and values.

It keeps no state of any sequence: what a batch's tokens are and where their keys and values lie comes with each call
(`PagedBatch`, `KVPages`). Nothing here records gradients, the weights do not require them; a caller that loops should
stand in `torch.inference_mode()`, which saves a tenth of a small model's time per call.
"""

from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from exeunt.compression.architecture import Architecture
from exeunt.compression.block import Block, Rotation
from exeunt.compression.block_weights import read_block, read_embedding, read_output
from exeunt.compression.checkpoint import open_checkpoint
from exeunt.compression.decode_graphs import DecodeGraphs, rounded_context
from exeunt.compression.device_pass import PassInputs, PassResults
from exeunt.compression.embedding import Embedding
from exeunt.compression.exit_output import ExitOutput
from exeunt.compression.graph_pool import GraphPool
from exeunt.compression.kv_format import KVPages
from exeunt.compression.linear import FullLinear, Linear
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.norm import Norm
from exeunt.compression.resident_blocks import DecoderBlocks, ResidentBlocks
from exeunt.compression.rope import RopeTables
from exeunt.compression.row_graphs import StepGraphs
from exeunt.compression.streamed_blocks import StreamedBlocks
from exeunt.compression.weights import WeightSource
from exeunt.kernels.blocks import NativeBlocks
from exeunt.kernels.paged_batch import PagedBatch


class BlockCalls:
    """How often each block was run, and over how many tokens: what the server's accounts are checked against.

    A block replaced by the linear block counts under its own number; `project_kv` runs no block.
    """

    __slots__ = ("_calls", "_tokens")

    def __init__(self, blocks: int) -> None:
        self._calls = [0] * (blocks + 1)  # how many more than of the block before
        self._tokens = [0] * (blocks + 1)

    def count(self, start: int, stop: int, tokens: int) -> None:
        """Blocks `start` to `stop` - 1 were run over so many tokens."""
        if start < stop:
            self._calls[start] += 1
            self._calls[stop] -= 1
            self._tokens[start] += tokens
            self._tokens[stop] -= tokens

    def uncount(self, start: int, stop: int, tokens: int) -> None:
        """Of tokens that were counted, so many were missing from blocks `start` to `stop` - 1."""
        self._tokens[start] -= tokens
        self._tokens[stop] += tokens

    @property
    def calls(self) -> list[int]:
        """By block, how often it was run."""
        return list(accumulate(self._calls[:-1]))

    @property
    def tokens(self) -> list[int]:
        """By block, over how many tokens."""
        return list(accumulate(self._tokens[:-1]))


class Decoder:
    """A model's blocks with its embedding and head; `spec`, `device`, `dtype`, `linear_block` say what it is."""

    def __init__(
        self,
        spec: Architecture,
        embedding: Embedding,
        output: Linear,
        blocks: DecoderBlocks,
        rope: RopeTables | None,
        *,
        exit_output: Linear | None = None,
        linear_block: LinearBlock | None = None,
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
        self._blocks = blocks if linear_block is None else blocks.with_linear_block(linear_block)
        self._rope = rope
        self._graphs: DecodeGraphs | None = None
        self._step_graphs: StepGraphs | None = None

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
        streamed: bool = False,
    ) -> "Decoder":
        """From tensors under canonical names (`exeunt.compression.checkpoint_names`), a block at a time.

        `streamed` keeps of the blocks only norms and biases: whoever runs one has it read, and the next one drops it
        (`exeunt.compression.streamed_blocks`), so that `weights` must stay what they are.

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
        frames = (
            None if share_with is None else [share_with._blocks.frame(index) for index in range(spec.blocks)]
        )
        if streamed:
            stream = StreamedBlocks.open(
                spec, weights, rope, place, dtype, int4_group_size=int4_group_size, frames=frames
            )
            return cls(spec, embedding, output, stream, rope)
        blocks = [
            read_block(
                spec,
                index,
                weights.block(index),
                place,
                dtype,
                int4_group_size=int4_group_size,
                frame=None if frames is None else frames[index],
            )
            for index in range(spec.blocks)
        ]
        return cls(spec, embedding, output, ResidentBlocks(spec, blocks, rope, place, dtype), rope)

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
        )

    def capture(self, most_context: int, shared: StepGraphs | None = None) -> DecodeGraphs | None:
        """Have passes, heads and gates run as CUDA graphs from now on, captured as their sizes are met, up to some.

        Returns those of passes over blocks; None where that cannot be: on a CPU, without the Triton kernels, with
        blocks that are read as they are run. Sequences may become `most_context` tokens long. Rotary tables are laid
        out for all of them first: a graph holds their address. Decoders of one model may have `shared` graphs.
        """
        self.release_graphs()  # they hold another server's pages
        blocks = self._blocks
        if not (isinstance(blocks, ResidentBlocks) and self.device.type == "cuda" and blocks.all_fused):
            return None
        if self._rope is not None:
            self._rope.reserve(rounded_context(most_context))
        self._step_graphs = shared or StepGraphs(GraphPool(self.device))
        self._project_exit.replay_in(self._step_graphs)
        shared = self._step_graphs
        self._graphs = DecodeGraphs(blocks, most_context, shared.pool, shared.outputs)
        return self._graphs

    def release_graphs(self) -> None:
        """Run every pass operation by operation again; what graphs held, pages among it, is free.

        Shared graphs are let go of for all that share them.
        """
        self._graphs = None
        self._project_exit.replay_in(None)
        if self._step_graphs is not None:
            self._step_graphs.release()
            self._step_graphs = None

    @property
    def step_graphs(self) -> StepGraphs | None:
        """What captured graphs share, None where none are captured."""
        return self._step_graphs

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """The state in front of block 0, [tokens, hidden], of int64 token ids and positions [tokens]."""
        return self._embedding.embed(token_ids, positions)

    def block(self, index: int) -> Block | LinearBlock:
        """What runs in the place of block `index`; of streamed blocks the last one asked for is in memory."""
        return self._blocks.block(index)

    def rotation(self, positions: Tensor, max_context: int) -> Rotation:
        """What turns queries and keys at `positions` [tokens] int64, all below `max_context`, for `Block`."""
        return self._rope.at(positions, max_context) if self._rope is not None else None

    def run_blocks(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> Tensor:
        """The state behind block `stop` - 1 of the state `hidden` [tokens, hidden] in front of block `start`.

        Writes the keys and values of every block passed. `hidden` is left as it is.
        """
        if start >= stop:
            return hidden
        found = None if self._graphs is None else self._graphs.run(hidden, batch, pages, start, stop)
        # the blocks add in place, and the caller may keep its state for a backfill
        hidden = self._blocks.run(hidden.clone(), batch, pages, start, stop) if found is None else found
        self.block_calls.count(start, stop, hidden.shape[0])
        return hidden

    def run_pass(
        self, hidden: Tensor, batch: PagedBatch, pages: KVPages, asked: PassInputs
    ) -> PassResults | None:
        """Tokens through all blocks, the exits on the way and the head, as one graph; see `run_device_pass`.

        `hidden` [tokens, hidden] is each token's state where it comes in, and stays. None where no captured graph fits:
        nothing has been done then. All blocks count as run over all tokens; see `BlockCalls.uncount`.
        """
        if self._graphs is None:
            return None
        found = self._graphs.run_pass(asked, self._head, self.spec.blocks, hidden, batch, pages)
        if found is not None:
            self.block_calls.count(0, self.spec.blocks, hidden.shape[0])
        return found

    def project_kv(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> None:
        """Write the keys and values that blocks `start` to `stop` - 1 make of the exit state `hidden`.

        `hidden` [tokens, hidden] is the state behind block `start` - 1, of which every skipped block is given the
        same. One native call on a CPU, each block's own rows on a GPU; elsewhere full-precision blocks go as one
        stacked matrix (see KVProjection).
        """
        if self._graphs is None or not self._graphs.project_kv(hidden, batch, pages, start, stop):
            self._blocks.project_kv(hidden, batch, pages, start, stop)

    @property
    def native_blocks(self) -> NativeBlocks | None:
        """All blocks as the native kernels read them; None where they do not run them, or not all are in memory."""
        return self._blocks.native if isinstance(self._blocks, ResidentBlocks) else None

    def rotation_table(self, positions: int) -> Tensor | None:
        """What turns queries and keys in the native kernels, for at least so many positions; None for learned ones."""
        return self._rope.table(positions) if self._rope is not None else None

    @property
    def embedding(self) -> Embedding:
        """What stands before the first block."""
        return self._embedding

    @property
    def final_norm(self) -> Norm:
        """What makes the state behind the last block, [tokens, hidden], the one that the output matrix reads."""
        return self._embedding.final_norm

    def project(self, state: Tensor) -> Tensor:
        """Logits [tokens, vocab] float32 of a state that has been through `final_norm` (or an exit's head)."""
        return self._output(state).float()

    @property
    def streamed(self) -> bool:
        """Whether blocks are read as they are run: a pass then costs a reading of all of them, whatever its width."""
        return isinstance(self._blocks, StreamedBlocks)

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
        if self._step_graphs is not None:
            key = ("the model's head", id(self._embedding), id(self._output))
            found = self._step_graphs.run(key, lambda hidden: (self._head(hidden),), hidden)
            if found is not None:
                return found[0].clone()
        return self._head(hidden)

    def _head(self, hidden: Tensor) -> Tensor:
        return self.project(self.final_norm(hidden))

    def resident_bytes(self) -> dict[str, int]:
        """Bytes held, by kind: embedding, full, int4 (linears; the output matrix, unless it is the embedding itself,
        among them), norms (with biases), kv_projection, exit_output (where exits read another form), exit_shortlists
        (copies of rows of what exits read), rope, linear_block, cuda_graphs (and what they read and leave). What
        another decoder shares counts in both; of streamed blocks those of the one held."""
        sizes = {"embedding": self._embedding.nbytes, **self._blocks.nbytes()}
        sizes["norms"] += self._embedding.final_norm.nbytes
        if not (isinstance(self._output, FullLinear) and self._output.weight is self._embedding.tokens):
            sizes[self._output.format] += self._output.nbytes
        sizes["exit_output"] = (
            self._project_exit.linear.nbytes if self._project_exit.linear is not self._output else 0
        )
        sizes["exit_shortlists"] = self._project_exit.shortlist_bytes
        sizes["rope"] = self._rope.nbytes if self._rope is not None else 0
        sizes["linear_block"] = self.linear_block.nbytes if self.linear_block is not None else 0
        sizes["cuda_graphs"] = self._step_graphs.pool.nbytes if self._step_graphs is not None else 0
        return sizes
