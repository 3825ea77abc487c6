"""Consecutive blocks that are all in memory, run as one: natively where possible, else one operation at a time."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from exeunt.compression.architecture import Architecture
from exeunt.compression.block import Block, BlockFrame, Rotation
from exeunt.compression.gpu_block import project_fused, run_fused, runs_fused
from exeunt.compression.kv_format import KVPages
from exeunt.compression.kv_projection import KVProjection
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.native_blocks import native_blocks
from exeunt.compression.rope import RopeTables, rotate
from exeunt.kernels.blocks import NativeBlocks
from exeunt.kernels.gpu import triton_runs
from exeunt.kernels.paged_batch import PagedBatch
from exeunt.kernels.write_kv import write_kv


class DecoderBlocks(Protocol):
    """A decoder's blocks, wherever their weights are kept."""

    def run(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> Tensor:
        """`Decoder.run_blocks`, but `hidden` may be overwritten."""
        ...

    def project_kv(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> None:
        """`Decoder.project_kv`."""
        ...

    def block(self, index: int) -> Block | LinearBlock:
        """What runs in the place of block `index`, as long as no other block is asked for."""
        ...

    def frame(self, index: int) -> BlockFrame:
        """Norms and biases of block `index`, replaced or not."""
        ...

    def nbytes(self) -> Mapping[str, int]:
        """Bytes held now, by kind: "full" and "int4" linears, "norms" (with biases), "kv_projection"."""
        ...

    def with_linear_block(self, linear_block: LinearBlock) -> "DecoderBlocks":
        """These with one replaced by the linear map; everything else is shared."""
        ...


class ResidentBlocks:
    """Blocks `first` and on of a model, some perhaps replaced by linear maps; `blocks` are what runs in their places.

    `native` is what the native kernel knows them by, None where it cannot run them.
    """

    def __init__(
        self,
        spec: Architecture,
        blocks: Sequence[Block | LinearBlock],
        rope: RopeTables | None,
        device: torch.device,
        dtype: torch.dtype,
        *,
        first: int = 0,
        unreplaced: "ResidentBlocks | None" = None,
    ) -> None:
        """`unreplaced` are the same blocks without a linear map, where these have one."""
        self.blocks = tuple(blocks)
        self._spec, self._rope, self._device, self._dtype, self._first = spec, rope, device, dtype, first
        self._unreplaced = unreplaced
        self._kv_projection: KVProjection = (
            KVProjection([block for block in self.blocks if isinstance(block, Block)])
            if unreplaced is None
            else unreplaced._kv_projection
        )
        self._native: NativeBlocks | None = None
        self._described = False  # whether `_native` is known

    @property
    def unreplaced(self) -> "ResidentBlocks":
        """The blocks as they were read."""
        return (
            self._unreplaced or self
        )  # not kept as a reference to itself, which only the collector could free

    @property
    def native(self) -> NativeBlocks | None:
        """The blocks for the native kernel, described when they are first asked for."""
        if not self._described:
            if not triton_runs(self._device):
                self._native = native_blocks(self._spec, self.blocks, self._device, self._dtype)
            self._described = True
        return self._native

    def run(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> Tensor:
        """The state behind block `stop` - 1 of the state `hidden` in front of block `start`; see `Decoder.run_blocks`.

        `hidden` may be overwritten.
        """
        native, places = self.native, pages.native(start, stop)
        if native is None or places is None or not native.takes(places):
            return self._run(hidden, batch, pages, start, stop)
        native.run(hidden, batch, places, self._rotation_table(batch), start - self._first)
        return hidden

    def project_kv(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> None:
        """Write the keys and values that blocks `start` to `stop` - 1 make of `hidden`; see `Decoder.project_kv`."""
        native, places = self.native, pages.native(start, stop)
        if native is None or places is None or not native.takes(places):
            self._project_kv(hidden, batch, pages, start, stop)
        else:
            table = self._rotation_table(batch)
            native.project_kv(hidden.contiguous(), batch, places, table, start - self._first)

    def block(self, index: int) -> Block | LinearBlock:
        """What runs in the place of block `index`."""
        return self.blocks[index - self._first]

    def frame(self, index: int) -> BlockFrame:
        """Norms and biases of block `index`, replaced or not."""
        block = self.unreplaced.blocks[index - self._first]
        if isinstance(block, LinearBlock):
            raise ValueError(f"Block {index} is a linear map, which has neither norms nor biases of a block.")
        return block.frame

    def nbytes(self) -> dict[str, int]:
        """Bytes by kind: "full" and "int4" linears, "norms" (with biases), "kv_projection"; of all blocks, replaced or
        not."""
        sizes = {"full": 0, "int4": 0, "norms": 0, "kv_projection": self._kv_projection.nbytes}
        for block in self.unreplaced.blocks:
            if isinstance(block, Block):
                for kind, size in block.nbytes().items():
                    sizes[kind] += size
        return sizes

    def with_linear_block(self, linear_block: LinearBlock) -> "ResidentBlocks":
        """The blocks as they were read, with one replaced by the linear map; all weights are shared."""
        blocks = list(self.unreplaced.blocks)
        blocks[linear_block.index - self._first] = linear_block
        return ResidentBlocks(
            self._spec,
            blocks,
            self._rope,
            self._device,
            self._dtype,
            first=self._first,
            unreplaced=self.unreplaced,
        )

    def _rotation_table(self, batch: PagedBatch) -> Tensor | None:
        """What turns queries and keys in the native kernel; None for learned positions."""
        return self._rope.table(batch.max_context) if self._rope is not None else None

    def _run(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> Tensor:
        """`run` one operation at a time, in place."""
        rotation: Rotation = None
        turned = False  # whether `rotation` is known
        for index in range(start, stop):
            block = self.blocks[index - self._first]
            if isinstance(block, LinearBlock):
                hidden = block.apply(hidden)
            elif runs_fused(block, self._device):
                hidden = run_fused(block, hidden, self._rotation_table(batch), batch, pages.block(index))
            else:
                rotation, turned = (rotation if turned else self._rotation(batch)), True
                hidden = block.run(hidden, rotation, batch, pages.block(index))
        return hidden

    @property
    def all_fused(self) -> bool:
        """Whether all blocks run in a GPU's fused kernels: those know padding."""
        return all(isinstance(block, LinearBlock) or runs_fused(block, self._device) for block in self.blocks)

    def _project_kv(self, hidden: Tensor, batch: PagedBatch, pages: KVPages, start: int, stop: int) -> None:
        """`project_kv` without the native kernel: on a GPU each block by itself, elsewhere full-precision blocks as one
        stacked matrix and INT4 ones each."""
        if self.all_fused:
            table = self._rotation_table(batch)
            for blocks in self._runs(start, stop):
                for block in blocks:
                    project_fused(block, hidden, table, batch, pages.block(block.index))
            return
        rotation = self._rotation(batch)
        for blocks in self._runs(start, stop):
            first, last = blocks[0].index, blocks[-1].index + 1
            if self._kv_projection.applies(first - self._first, last - self._first):
                self._project_stacked(hidden, rotation, batch, pages, first, last)
            else:
                for block in blocks:
                    block.project_kv(hidden, rotation, batch.slots, pages.block(block.index))

    def _rotation(self, batch: PagedBatch) -> Rotation:
        return self._rope.at(batch.positions, batch.max_context) if self._rope is not None else None

    def _runs(self, start: int, stop: int) -> list[list[Block]]:
        """Blocks `start` to `stop` - 1 as runs without linear maps, which have no keys and values."""
        runs: list[list[Block]] = [[]]
        for block in self.blocks[start - self._first : stop - self._first]:
            if isinstance(block, Block):
                runs[-1].append(block)
            else:
                runs.append([])
        return [run for run in runs if run]

    def _project_stacked(
        self, hidden: Tensor, rotation: Rotation, batch: PagedBatch, pages: KVPages, start: int, stop: int
    ) -> None:
        keys, values = self._kv_projection(hidden, start - self._first, stop - self._first)
        if rotation is not None:
            cosines, sines = rotation
            keys = rotate(keys, cosines.unsqueeze(1), sines.unsqueeze(1))
        for offset in range(stop - start):
            write_kv(keys[:, offset], values[:, offset], batch.slots, pages.block(start + offset))
