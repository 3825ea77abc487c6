"""Blocks that are read when they are run, one at a time: a full-precision model on a machine that cannot hold it.

A block is read from its file (whose pages the system keeps in memory as long as nobody else needs it), run, and dropped
before the next one is read. It is run by the code that runs resident blocks, so that the results are the same bits
wherever one block's result does not depend on which blocks share the call: always for states, and for projected keys
and values wherever the native kernel runs (elsewhere a stack of several blocks' rows is one matrix product).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from exeunt.compression.architecture import Architecture
from exeunt.compression.block import Block, BlockFrame
from exeunt.compression.block_weights import read_block, read_frame
from exeunt.compression.kv_format import KVPages
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.resident_blocks import ResidentBlocks
from exeunt.compression.rope import RopeTables
from exeunt.compression.weights import WeightSource
from exeunt.kernels.paged_batch import PagedBatch


class HeldBlock:
    """The one block that is in memory, shared by all decoders that stream from the same source."""

    def __init__(
        self,
        spec: Architecture,
        weights: WeightSource,
        frames: Sequence[BlockFrame],
        rope: RopeTables | None,
        device: torch.device,
        dtype: torch.dtype,
        int4_group_size: int | None,
    ) -> None:
        self.spec, self.rope, self.device, self.dtype = spec, rope, device, dtype
        self.frames = tuple(frames)
        self._weights, self._int4_group_size = weights, int4_group_size
        self._index: int | None = None
        self._block: ResidentBlocks | None = None

    @property
    def block(self) -> ResidentBlocks | None:
        """What is in memory now."""
        return self._block

    def read(self, index: int) -> ResidentBlocks:
        """Block `index`, read unless it is the one held; what was held is dropped first. Raises WeightError."""
        if self._block is not None and self._index == index:
            return self._block
        self.drop()
        with torch.inference_mode(False):  # who asks first must not decide what the tensors may be used for
            block = read_block(
                self.spec,
                index,
                self._weights.block(index),
                self.device,
                self.dtype,
                int4_group_size=self._int4_group_size,
                frame=self.frames[index],
            )
        self._block = ResidentBlocks(self.spec, (block,), self.rope, self.device, self.dtype, first=index)
        self._index = index
        return self._block

    def drop(self) -> None:
        """Hold no block."""
        self._index = self._block = None


class StreamedBlocks:
    """All blocks of a model, of which at most one is in memory; norms and biases, which are small, always are."""

    def __init__(self, held: HeldBlock, linear_block: LinearBlock | None = None) -> None:
        """Most callers want `open`."""
        self.held = held
        self._replaced: tuple[int, ResidentBlocks] | None = None
        if linear_block is not None:
            index, place = linear_block.index, (linear_block,)
            alone = ResidentBlocks(held.spec, place, held.rope, held.device, held.dtype, first=index)
            self._replaced = index, alone

    @classmethod
    def open(
        cls,
        spec: Architecture,
        weights: WeightSource,
        rope: RopeTables | None,
        device: torch.device,
        dtype: torch.dtype,
        *,
        int4_group_size: int | None = None,
        frames: Sequence[BlockFrame] | None = None,
    ) -> "StreamedBlocks":
        """The blocks of `weights`; `frames` are their norms and biases, which are read where none are given.

        Raises WeightError, as do `run` and `project_kv` for what is wrong with a block's matrices.
        """
        if frames is None:
            frames = [
                read_frame(spec, index, weights.block(index), device, dtype) for index in range(spec.blocks)
            ]
        return cls(HeldBlock(spec, weights, frames, rope, device, dtype, int4_group_size))

    def run(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> Tensor:
        """As `ResidentBlocks.run`, each block read when its turn comes."""
        self._check(start, stop)
        for index in range(start, stop):
            hidden = self._at(index).run(hidden, batch, pages, index, index + 1)
        return hidden

    def project_kv(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> None:
        """As `ResidentBlocks.project_kv`, each block read when its turn comes."""
        self._check(start, stop)
        for index in range(start, stop):
            self._at(index).project_kv(hidden, batch, pages, index, index + 1)

    def block(self, index: int) -> Block | LinearBlock:
        """What runs in the place of block `index`, read if it is not the one held."""
        self._check(index, index + 1)
        return self._at(index).block(index)

    def frame(self, index: int) -> BlockFrame:
        """Norms and biases of block `index`, replaced or not."""
        return self.held.frames[index]

    def nbytes(self) -> dict[str, int]:
        """Bytes held now by kind, see `ResidentBlocks.nbytes`: all norms and biases, the matrices of one block."""
        sizes = {"full": 0, "int4": 0, "norms": 0, "kv_projection": 0}
        if self.held.block is not None:
            sizes |= self.held.block.nbytes()
        sizes["norms"] = sum(frame.nbytes for frame in self.held.frames)
        return sizes

    def with_linear_block(self, linear_block: LinearBlock) -> "StreamedBlocks":
        """The same blocks, of which still only one is held, with one replaced by the linear map."""
        return StreamedBlocks(self.held, linear_block)

    def _at(self, index: int) -> ResidentBlocks:
        if self._replaced is not None and self._replaced[0] == index:
            return self._replaced[1]
        return self.held.read(index)

    def _check(self, start: int, stop: int) -> None:
        """Raise ValueError for blocks that there are not, before the first is read."""
        blocks = self.held.spec.blocks
        if start < 0 or stop > blocks:
            raise ValueError(
                f"blocks {start} to {stop - 1} were asked for, the decoder has 0 to {blocks - 1}"
            )
