"""Consecutive blocks of a decoder in one native call: a stage between two exits.

Called one operation at a time a small model spends its decode steps between the operations rather than in them. The
reference is `exeunt.compression.block`, which strings the same kernels together one by one; where the native library is
missing or a layer is of another kind, that file runs.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from exeunt.kernels.native.descriptors import Matrix, NativePages, native_batch
from exeunt.kernels.native.library import DTYPE_CODES, NativeLibrary
from exeunt.kernels.paged_batch import PagedBatch

ACTIVATION_CODES = {"silu": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "gelu": 2, "relu": 3}

TILE_TOKENS = 256
"""Tokens that pass a part of a block together: what lies between its operations then stays in the caches."""

OWN_ROWS_WORK = 1 << 22
"""Multiplications by weights in a run of blocks from which threads may take rows by themselves.

Of INT4 weights some 50 µs of a fast core's arithmetic, of full ones several times that.
"""

_pointer, _long = ctypes.c_void_p, ctypes.c_int64


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
        ("widest", _long),
        ("own_rows_work", _long),
    )


@dataclass(frozen=True, slots=True)
class PageRange:
    """The pages of consecutive blocks as the native library reads them."""

    addresses: "ctypes.Array[ctypes.c_void_p]"  # null for a block without keys and values
    dtypes: frozenset[torch.dtype]  # of those that are not INT4
    described: tuple[NativePages | None, ...]  # what the addresses point to
    without: tuple[int, ...]  # which of them are None
    kv_heads: int | None  # of all that are not, None where there are none
    head_dim: int | None

    @classmethod
    def of(cls, pages: Sequence[NativePages | None]) -> "PageRange":
        """The range of these blocks' pages; raises ValueError where their heads differ."""
        heads = {(each.kv_heads, each.head_dim) for each in pages if each is not None}
        if len(heads) > 1:
            raise ValueError(f"the pages of one range have different (KV heads, head_dim): {sorted(heads)}")
        kv_heads, head_dim = heads.pop() if heads else (None, None)
        addresses = (_pointer * len(pages))(*(None if each is None else each.address for each in pages))
        dtypes = frozenset(each.dtype for each in pages if each is not None and each.dtype is not None)
        without = tuple(index for index, each in enumerate(pages) if each is None)
        return cls(addresses, dtypes, tuple(pages), without, kv_heads, head_dim)


@dataclass(frozen=True, slots=True)
class NativeBlocks:
    """All blocks of a decoder as the native library reads them. `tensors` are what the addresses point into.

    Raises ValueError where the sizes of a block's matrices contradict `shape`.
    """

    library: NativeLibrary
    dtype: torch.dtype
    shape: BlockShape
    parts: "ctypes.Array[BlockParts]"
    tensors: tuple[Tensor, ...]
    linear_maps: frozenset[int] = field(init=False)  # blocks without keys and values

    def __post_init__(self) -> None:
        maps = frozenset(index for index, part in enumerate(self.parts) if part.is_linear_map)
        object.__setattr__(self, "linear_maps", maps)
        for index, part in enumerate(self.parts):
            _check_matrices(index, part, self.shape)

    def run(
        self, hidden: Tensor, batch: PagedBatch, pages: PageRange, rotation: Tensor | None, start: int
    ) -> None:
        """Replace `hidden` [tokens, hidden], dense, by the state behind the blocks of `pages`, `start` the first.

        `rotation` [positions, 2, head_dim] holds cosines and signed sines, None for learned positions. Writes the keys
        and values of every block. Raises ValueError where the arguments do not fit the blocks or each other. The values
        inside `batch` are not looked at: positions below its max_context, slots and pages inside the arena are what the
        page tables that made it answer for.
        """
        self._call(self.library.run_blocks, hidden, batch, pages, rotation, start)

    def project_kv(
        self, hidden: Tensor, batch: PagedBatch, pages: PageRange, rotation: Tensor | None, start: int
    ) -> None:
        """Write the keys and values that the blocks make of `hidden` [tokens, hidden], which stays as it is.

        Raises as `run` does.
        """
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
        self.check(hidden, batch, pages, rotation, start)
        scratch = self.scratch(hidden.shape[0])
        function(
            *self.arguments(hidden, batch, pages, rotation, start, scratch),
            DTYPE_CODES[self.dtype],
            torch.get_num_threads(),
        )

    def check(
        self, hidden: Tensor, batch: PagedBatch, pages: PageRange, rotation: Tensor | None, start: int
    ) -> None:
        """Raise ValueError where the arguments of a pass do not fit the blocks or each other."""
        tokens, slots = hidden.shape[0], batch.slots
        if batch.tokens != tokens or slots.shape != (tokens,) or not _dense(slots, torch.int64):
            raise ValueError(
                f"the batch has {batch.tokens} tokens and {list(slots.shape)} {slots.dtype} slots, expected {tokens} "
                "tokens as in hidden, with a dense int64 slot each"
            )
        self.check_operands(hidden, tokens, batch.max_context, pages, rotation, start)

    def check_operands(
        self,
        hidden: Tensor,
        tokens: int,
        max_context: int,
        pages: PageRange,
        rotation: Tensor | None,
        start: int,
    ) -> None:
        """Raise ValueError where states, pages or rotation do not fit the blocks, or a batch of these sizes."""
        shape, dtype = self.shape, self.dtype
        if hidden.shape != (tokens, shape.hidden) or not _dense(hidden, dtype):
            raise ValueError(
                f"hidden is {list(hidden.shape)} {hidden.dtype}, expected dense [{tokens}, {shape.hidden}] {dtype}"
            )
        self._check_pages(pages, start)
        if rotation is not None and not (
            _dense(rotation, dtype)
            and rotation.shape == (rotation.shape[0], 2, shape.head_dim)
            and rotation.shape[0] >= max_context
        ):
            raise ValueError(
                f"the rotation is {list(rotation.shape)} {rotation.dtype}, expected dense [positions, 2, "
                f"{shape.head_dim}] {dtype} with at least {max_context} positions"
            )

    def scratch(self, tokens: int) -> Tensor:
        """What a pass of so many tokens works in, dense."""
        shape = self.shape
        queries = shape.heads * shape.head_dim
        projected = queries + 2 * shape.kv_heads * shape.head_dim
        of_a_tile = 2 * shape.hidden + max(queries, shape.inner) + shape.widest
        return torch.empty(tokens * projected + min(tokens, TILE_TOKENS) * of_a_tile, dtype=self.dtype)

    def arguments(
        self,
        hidden: Tensor,
        batch: PagedBatch,
        pages: PageRange,
        rotation: Tensor | None,
        start: int,
        scratch: Tensor,
    ) -> tuple[object, ...]:
        """What the native functions are told of a pass that was checked, from its states to its tiles."""
        return (
            hidden.data_ptr(),
            hidden.shape[0],
            ctypes.addressof(self.shape),
            ctypes.addressof(self.parts) + start * ctypes.sizeof(BlockParts),
            pages.addresses,
            len(pages.described),
            native_batch(batch).address,
            batch.slots.data_ptr(),
            None if rotation is None else rotation.data_ptr(),
            scratch.data_ptr(),
            TILE_TOKENS,
        )

    def _check_pages(self, pages: PageRange, start: int) -> None:
        """Raise ValueError unless the pages are those of blocks of this decoder, `start` the first."""
        shape, stop = self.shape, start + len(pages.described)
        if start < 0 or stop > len(self.parts):
            raise ValueError(
                f"blocks {start} to {stop - 1} were asked for, the decoder has 0 to {len(self.parts) - 1}"
            )
        for index in pages.without:
            if start + index not in self.linear_maps:
                raise ValueError(f"block {start + index} needs keys and values, the pages hold none for it")
        heads = (pages.kv_heads, pages.head_dim)
        if pages.kv_heads is not None and heads != (shape.kv_heads, shape.head_dim):
            raise ValueError(
                f"the pages have (KV heads, head_dim) {heads}, the blocks {(shape.kv_heads, shape.head_dim)}"
            )
        if not self.takes(pages):
            raise ValueError(f"the pages hold {pages.dtypes}, the blocks write {self.dtype}")


def _dense(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype and tensor.is_contiguous() and tensor.is_cpu


def _check_matrices(index: int, part: BlockParts, shape: BlockShape) -> None:
    """Raise ValueError where a matrix of block `index` would read or write past what `shape` makes room for."""
    hidden, mixed = shape.hidden, shape.heads * shape.head_dim
    if part.is_linear_map:
        expected = {"qkv": (hidden, part.qkv.outputs), "out": (part.qkv.outputs, hidden)}
    else:
        expected = {
            "qkv": (hidden, mixed + 2 * shape.kv_heads * shape.head_dim),
            "out": (mixed, hidden),
            "up": (hidden, shape.inner * (2 if shape.gated else 1)),
            "down": (shape.inner, hidden),
        }
    for name, sizes in expected.items():
        matrix: Matrix = getattr(part, name)
        if (matrix.inputs, matrix.outputs) != sizes:
            raise ValueError(
                f"block {index}: {name} has {matrix.inputs} inputs and {matrix.outputs} outputs, expected {sizes}"
            )
    if max(part.qkv.outputs, part.up.outputs) > shape.widest:
        raise ValueError(
            f"block {index} is {max(part.qkv.outputs, part.up.outputs)} wide, room is for {shape.widest}"
        )
