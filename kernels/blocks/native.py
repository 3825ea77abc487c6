"""Consecutive blocks of a decoder in one native call: a stage between two exits.

Called one operation at a time a small model spends nine tenths of a decode step between the operations. The reference
is `exeunt.compression.block`, which strings the same kernels together one by one; where the native library is missing
or a layer is of another kind, that file runs.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exeunt.kernels.native.descriptors import NativePages, native_batch
from exeunt.kernels.native.library import DTYPE_CODES, NativeLibrary
from exeunt.kernels.paged_batch import PagedBatch

ACTIVATION_CODES = {"silu": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "gelu": 2, "relu": 3}

_pointer, _long = ctypes.c_void_p, ctypes.c_int64


class Matrix(ctypes.Structure):
    """`struct Matrix` of kernels/native/blocks.h; a `group_size` of 0 is full precision."""

    _fields_ = (
        ("weight", _pointer),
        ("bias", _pointer),
        ("group_size", _long),
        ("inputs", _long),
        ("outputs", _long),
    )


class NormWeights(ctypes.Structure):
    """`struct NormWeights`: the addresses of weight and bias."""

    _fields_ = (("weight", _pointer), ("bias", _pointer))


class BlockParts(ctypes.Structure):
    """`struct BlockParts`: the addresses of one block's weights."""

    _fields_ = (
        ("is_linear_map", _long),
        ("attention_norm", NormWeights),
        ("mlp_norm", NormWeights),
        ("head_norm", _pointer),
        ("qkv", Matrix),
        ("out", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("window", _long),
        ("scale", ctypes.c_double),
    )


class BlockShape(ctypes.Structure):
    """`struct BlockShape`: what all blocks have in common; `rotation` is filled in by each call."""

    _fields_ = (
        ("hidden", _long),
        ("heads", _long),
        ("kv_heads", _long),
        ("head_dim", _long),
        ("inner", _long),
        ("gated", _long),
        ("activation", _long),
        ("layer_norm", _long),
        ("eps", ctypes.c_double),
        ("rotation", _pointer),
    )


@dataclass(frozen=True, slots=True)
class NativeBlocks:
    """All blocks of a decoder as the native library reads them. `tensors` are what the addresses point into."""

    library: NativeLibrary
    dtype: torch.dtype
    shape: BlockShape
    parts: "ctypes.Array[BlockParts]"
    tensors: tuple[Tensor, ...]

    def run(
        self,
        hidden: Tensor,
        batch: PagedBatch,
        pages: Sequence[NativePages | None],
        rotation: Tensor | None,
        start: int,
    ) -> None:
        """Replace `hidden` [tokens, hidden], dense, by the state behind as many blocks as there are `pages`.

        `pages` are those of block `start` and the following, None for a block without keys and values; `rotation`
        [positions, 2, head_dim] holds cosines and signed sines. Writes the keys and values of every block.
        """
        self._call(self.library.run_blocks, hidden, batch, pages, rotation, start)

    def project_kv(
        self,
        hidden: Tensor,
        batch: PagedBatch,
        pages: Sequence[NativePages | None],
        rotation: Tensor | None,
        start: int,
    ) -> None:
        """Write the keys and values that the blocks make of `hidden` [tokens, hidden], which stays as it is."""
        self._call(self.library.project_kv, hidden, batch, pages, rotation, start)

    def takes(self, pages: Sequence[NativePages | None]) -> bool:
        """Whether the pages hold what the blocks would write: INT4, or the blocks' own dtype."""
        return all(place is None or place.dtype in (None, self.dtype) for place in pages)

    def _call(
        self,
        function: object,
        hidden: Tensor,
        batch: PagedBatch,
        pages: Sequence[NativePages | None],
        rotation: Tensor | None,
        start: int,
    ) -> None:
        tokens = hidden.shape[0]
        shape = self.shape
        if hidden.dtype != self.dtype or not hidden.is_contiguous() or hidden.shape[1] != shape.hidden:
            raise ValueError(
                f"hidden is {list(hidden.shape)} {hidden.dtype}, expected dense [tokens, {shape.hidden}] {self.dtype}"
            )
        if batch.slots.dtype != torch.int64 or not batch.slots.is_contiguous() or batch.tokens != tokens:
            raise ValueError(f"the batch has {batch.tokens} tokens, hidden has {tokens}")
        widest = self._widest(start, start + len(pages))
        mixed = max(shape.heads * shape.head_dim, shape.inner)
        scratch = torch.empty(tokens * (2 * shape.hidden + widest + mixed), dtype=self.dtype)
        places = (_pointer * len(pages))(*(None if place is None else place.address for place in pages))
        own = BlockShape.from_buffer_copy(shape)
        own.rotation = None if rotation is None else rotation.data_ptr()
        function(  # type: ignore[operator]
            hidden.data_ptr(),
            tokens,
            ctypes.addressof(own),
            ctypes.addressof(self.parts) + start * ctypes.sizeof(BlockParts),
            places,
            len(pages),
            native_batch(batch).address,
            batch.slots.data_ptr(),
            scratch.data_ptr(),
            widest,
            DTYPE_CODES[self.dtype],
            torch.get_num_threads(),
        )

    def _widest(self, start: int, stop: int) -> int:
        """Outputs of the widest projection of these blocks, and a vector more for key rows that begin inside one."""
        widest = max(max(part.qkv.outputs, part.up.outputs) for part in self.parts[start:stop])
        return int(widest) + self.library.lanes
