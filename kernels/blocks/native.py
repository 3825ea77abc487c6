"""Consecutive blocks of a decoder in one native call: a stage between two exits.

Called one operation at a time a small model spends nine tenths of a decode step between the operations. The reference
is `exeunt.compression.block`, which strings the same kernels together one by one; where the native library is missing
or a layer is of another kind, that file runs.
"""

import ctypes
from collections.abc import Callable, Sequence
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
    """`struct BlockShape`: what all blocks have in common."""

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
    )


@dataclass(frozen=True, slots=True)
class PageRange:
    """The pages of consecutive blocks as the native library reads them."""

    addresses: "ctypes.Array[ctypes.c_void_p]"  # null for a block without keys and values
    dtypes: frozenset[torch.dtype]  # of those that are not INT4
    described: tuple[NativePages | None, ...]  # what the addresses point to

    @classmethod
    def of(cls, pages: Sequence[NativePages | None]) -> "PageRange":
        """The range of these blocks' pages."""
        addresses = (_pointer * len(pages))(*(None if each is None else each.address for each in pages))
        dtypes = frozenset(each.dtype for each in pages if each is not None and each.dtype is not None)
        return cls(addresses, dtypes, tuple(pages))


@dataclass(frozen=True, slots=True)
class NativeBlocks:
    """All blocks of a decoder as the native library reads them. `tensors` are what the addresses point into."""

    library: NativeLibrary
    dtype: torch.dtype
    shape: BlockShape
    parts: "ctypes.Array[BlockParts]"
    tensors: tuple[Tensor, ...]
    widest: int  # values per token of the widest projection

    def run(
        self, hidden: Tensor, batch: PagedBatch, pages: PageRange, rotation: Tensor | None, start: int
    ) -> None:
        """Replace `hidden` [tokens, hidden], dense, by the state behind the blocks of `pages`, `start` the first.

        `rotation` [positions, 2, head_dim] holds cosines and signed sines, None for learned positions. Writes the keys
        and values of every block.
        """
        self._call(self.library.run_blocks, hidden, batch, pages, rotation, start)

    def project_kv(
        self, hidden: Tensor, batch: PagedBatch, pages: PageRange, rotation: Tensor | None, start: int
    ) -> None:
        """Write the keys and values that the blocks make of `hidden` [tokens, hidden], which stays as it is."""
        self._call(self.library.project_kv, hidden, batch, pages, rotation, start)

    def takes(self, pages: PageRange) -> bool:
        """Whether the pages hold what the blocks would write: INT4, or the blocks' own dtype."""
        return not pages.dtypes or pages.dtypes == {self.dtype}

    def _call(
        self,
        function: Callable[..., None],
        hidden: Tensor,
        batch: PagedBatch,
        pages: PageRange,
        rotation: Tensor | None,
        start: int,
    ) -> None:
        tokens, shape = hidden.shape[0], self.shape
        if hidden.dtype != self.dtype or not hidden.is_contiguous() or hidden.shape[1] != shape.hidden:
            raise ValueError(
                f"hidden is {list(hidden.shape)} {hidden.dtype}, expected dense [tokens, {shape.hidden}] {self.dtype}"
            )
        if batch.slots.dtype != torch.int64 or not batch.slots.is_contiguous() or batch.tokens != tokens:
            raise ValueError(f"the batch has {batch.tokens} tokens, hidden has {tokens}")
        mixed = max(shape.heads * shape.head_dim, shape.inner)
        scratch = torch.empty(tokens * (2 * shape.hidden + self.widest + mixed), dtype=self.dtype)
        function(
            hidden.data_ptr(),
            tokens,
            ctypes.addressof(shape),
            ctypes.addressof(self.parts) + start * ctypes.sizeof(BlockParts),
            pages.addresses,
            len(pages.described),
            native_batch(batch).address,
            batch.slots.data_ptr(),
            None if rotation is None else rotation.data_ptr(),
            scratch.data_ptr(),
            self.widest,
            DTYPE_CODES[self.dtype],
            torch.get_num_threads(),
        )
