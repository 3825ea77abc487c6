"""How keys and values lie in pages: one arena of equal pages that every layout shares.

A page holds the keys and values of a run of tokens, for all blocks that hold KV. Its bytes are the same for every
layout, so that one pool of pages serves them all: what a layout saves per token (INT4, one block fewer) shows as
more tokens to the page. Inside a page the blocks follow each other; a block's region is, for the full format,
[keys | values], each [kv_heads, page_tokens, head_dim]; for INT4 [key params | value params | keys | values], the
params [kv_heads, page_tokens, 2] float16 and the codes [kv_heads, page_tokens, head_dim / 2] bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from exeunt.compression.architecture import Architecture
from exeunt.compression.variant import KVFormat
from exeunt.kernels.blocks import PageRange
from exeunt.kernels.native.descriptors import native_pages
from exeunt.kernels.paged_batch import KVBlock

ALIGNMENT = 64  # bytes; a cache line, so that no two blocks or pages share one
_PARAM_BYTES = 4  # scale and minimum, float16


class KVLayoutError(ValueError):
    """The layout cannot hold this model's keys and values; the message says why."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The layout of one kind of page: which blocks' KV it holds, and in which format.

    Raises KVLayoutError where not even one token fits the page, or INT4 is asked for an odd head size.
    """

    format: KVFormat
    blocks: tuple[
        int, ...
    ]  # the model's blocks that hold KV, ascending; a block replaced by a linear map holds none
    kv_heads: int
    head_dim: int
    dtype: torch.dtype  # of keys and values in the full format, the model's
    page_bytes: int

    def __post_init__(self) -> None:
        if self.format == "int4" and self.head_dim % 2:
            raise KVLayoutError(
                f"INT4 keys and values need an even head size; this model's is {self.head_dim}."
            )
        if self.page_bytes % ALIGNMENT:
            raise KVLayoutError(f"page_bytes is {self.page_bytes}; it must be a multiple of {ALIGNMENT}.")
        if self.page_tokens < 1:
            raise KVLayoutError(
                f"One token's keys and values take {self.bytes_per_token} bytes in {len(self.blocks)} blocks; "
                f"a page has only {self.page_bytes}."
            )

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all blocks, padding not counted."""
        return len(self.blocks) * 2 * self.kv_heads * self._head_bytes

    @property
    def page_tokens(self) -> int:
        """Tokens that fit one page: the most whose regions, each padded to ALIGNMENT, stay within page_bytes."""
        if not self.blocks:
            return self.page_bytes  # no block holds KV: any number of tokens fits, so pages never limit
        region = self.page_bytes // len(self.blocks) // ALIGNMENT * ALIGNMENT
        return region // (2 * self.kv_heads * self._head_bytes)

    def slot_of(self, block: int) -> int:
        """Which region of a page belongs to the model's block `block`; KVLayoutError where it holds no KV."""
        try:
            return self.blocks.index(block)
        except ValueError:
            raise KVLayoutError(f"Block {block} holds no keys and values in this layout.") from None

    @property
    def _head_bytes(self) -> int:
        if self.format == "int4":
            return self.head_dim // 2 + _PARAM_BYTES
        return self.head_dim * self.dtype.itemsize

    @property
    def _region_bytes(self) -> int:
        return _align(self.page_tokens * 2 * self.kv_heads * self._head_bytes)

    def region_offset(self, block: int) -> int:
        """Bytes from a page's start to the model's block `block`."""
        return self.slot_of(block) * self._region_bytes


class KVPages:
    """The arena seen through one layout. `arena` is uint8 [num_pages × page_bytes]; nothing is copied.

    A page belongs to one layout at a time; who that is, is the page pool's business, not this class's.
    """

    def __init__(self, layout: KVLayout, arena: Tensor) -> None:
        if arena.dtype != torch.uint8 or arena.dim() != 1 or arena.numel() % layout.page_bytes:
            raise KVLayoutError(
                f"The arena is {list(arena.shape)} {arena.dtype}; it must be uint8 with a multiple of "
                f"{layout.page_bytes} bytes."
            )
        self.layout = layout
        self.arena = arena
        self.num_pages = arena.numel() // layout.page_bytes
        self._blocks = {block: self._views(block) for block in layout.blocks}
        self._ranges: dict[tuple[int, int], PageRange | None] = {}  # described when first asked for

    def block(self, block: int) -> KVBlock:
        """The keys and values of the model's block `block`; KVLayoutError where it holds none."""
        try:
            return self._blocks[block]
        except KeyError:
            raise KVLayoutError(f"Block {block} holds no keys and values in this layout.") from None

    def native(self, start: int, stop: int) -> PageRange | None:
        """Blocks `start` to `stop` - 1 as the native kernels read them, or None where they do not take these pages."""
        if (start, stop) not in self._ranges:
            described = {block: native_pages(views) for block, views in self._blocks.items()}
            taken = None not in described.values()
            found = [described.get(block) for block in range(start, stop)]
            self._ranges[start, stop] = PageRange.of(found) if taken else None
        return self._ranges[start, stop]

    def _views(self, block: int) -> KVBlock:
        layout, offset = self.layout, self.layout.region_offset(block)
        heads = layout.kv_heads * layout.page_tokens
        if layout.format == "full":
            size = heads * layout.head_dim * layout.dtype.itemsize
            return KVBlock(
                keys=self._view(offset, layout.head_dim, layout.dtype),
                values=self._view(offset + size, layout.head_dim, layout.dtype),
            )
        codes = offset + 2 * heads * _PARAM_BYTES
        return KVBlock(
            keys=self._view(codes, layout.head_dim // 2, torch.uint8),
            values=self._view(codes + heads * (layout.head_dim // 2), layout.head_dim // 2, torch.uint8),
            key_params=self._view(offset, 2, torch.float16),
            value_params=self._view(offset + heads * _PARAM_BYTES, 2, torch.float16),
        )

    def _view(self, offset: int, width: int, dtype: torch.dtype) -> Tensor:
        """[pages, kv_heads, page_tokens, width] of `dtype`, `offset` bytes into each page."""
        layout, size = self.layout, dtype.itemsize
        shape = (self.num_pages, layout.kv_heads, layout.page_tokens, width)
        strides = (layout.page_bytes // size, layout.page_tokens * width, width, 1)
        elements = self.arena.view(dtype)
        return elements.as_strided(shape, strides, elements.storage_offset() + offset // size)


def kv_layout(
    spec: Architecture, format: KVFormat, dtype: torch.dtype, page_bytes: int, linear_block: int | None = None
) -> KVLayout:
    """The layout of a model's pages; the block replaced by a linear map, where there is one, holds no KV."""
    blocks = tuple(block for block in range(spec.blocks) if block != linear_block)
    return KVLayout(format, blocks, spec.kv_heads, spec.head_dim, dtype, page_bytes)


def page_bytes_for(spec: Architecture, dtype: torch.dtype, page_tokens: int = 16) -> int:
    """The common page size in bytes: `page_tokens` tokens of every block in the full format."""
    region = _align(page_tokens * 2 * spec.kv_size * dtype.itemsize)
    return spec.blocks * region


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
