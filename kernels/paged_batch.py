"""Where a batch's tokens are and where their keys and values lie: the geometry attention kernels share."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Where the numbers of a batch lie in one tensor [numbers] int64: one copy moves them all.

    There is room for `tokens` tokens, `rows` rows and `pages` pages a row. Every part begins at a multiple of 16 bytes:
    kernels are compiled anew for tensors that do not. Positions come first and then slots, wherever the rest lies.
    """

    tokens: int
    rows: int
    pages: int
    slots: int = field(init=False, compare=False)  # where slots begin, among numbers of int64
    places: int = field(init=False, compare=False)  # how many of those positions and slots take at the front
    starts: int = field(init=False, compare=False)  # where the rows' starts begin, among numbers of int32
    tables: int = field(init=False, compare=False)  # where the page tables do, row by row
    numbers: int = field(init=False, compare=False)  # how many int64 numbers there are in all

    def __post_init__(self) -> None:
        slots = _rounded(self.tokens, 2)
        tables = 4 * slots + _rounded(self.rows + 1, 4)
        offsets = {
            "slots": slots,
            "places": 2 * slots,
            "starts": 4 * slots,
            "tables": tables,
            "numbers": (tables + _rounded(self.rows * self.pages, 4)) // 2,
        }
        for name, offset in offsets.items():
            object.__setattr__(self, name, offset)

    def batch(self, numbers: Tensor, tokens: int, rows: int, max_context: int) -> "PagedBatch":
        """The batch of the first `tokens` tokens and `rows` rows: views of `numbers`, which it remembers."""
        wide = numbers.view(torch.int32)
        batch = PagedBatch(
            positions=numbers[:tokens],
            slots=numbers[self.slots : self.slots + tokens],
            query_starts=wide[self.starts : self.starts + rows + 1],
            page_tables=wide[self.tables : self.tables + rows * self.pages].view(rows, self.pages),
            max_context=max_context,
        )
        object.__setattr__(batch, "packed", PackedNumbers(self, numbers))
        return batch


@dataclass(frozen=True, slots=True)
class PackedNumbers:
    """The one tensor that holds a batch's numbers, padding included, and how they lie in it."""

    layout: BatchLayout
    numbers: Tensor  # [layout.numbers] int64


def _rounded(count: int, unit: int) -> int:
    return -(-count // unit) * unit


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """The geometry of one batch of query tokens over paged keys and values.

    Tokens of one row stand together, their positions ascending but not necessarily contiguous: tokens that
    left the model early are missing at deeper blocks. A token at position p attends to the keys of its own
    row at positions 0..p (or the last `window` of them), whoever wrote them.
    """

    positions: Tensor  # [tokens] int64, absolute position of each query token in its sequence
    slots: Tensor  # [tokens] int64, where the token's own K and V go: page × page_tokens + offset
    query_starts: Tensor  # [rows + 1] int32, row r owns tokens query_starts[r] .. query_starts[r + 1] - 1
    page_tables: Tensor  # [rows, pages] int32, each row's pages in order; entries past its end are ignored
    max_context: int  # 1 + the largest position in the batch
    masked: bool = False  # whether tokens may be missing, which then keep their places: see `keeping`
    packed: PackedNumbers | None = field(default=None, init=False, repr=False, compare=False)
    native: object = field(default=None, init=False, repr=False, compare=False)  # kernels.native keeps it

    def __reduce__(self) -> tuple[type["PagedBatch"], tuple[object, ...]]:
        # `native` holds addresses of this batch's tensors: a copy is described anew
        places = (self.positions, self.slots, self.query_starts, self.page_tables)
        return PagedBatch, (*places, self.max_context, self.masked)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.positions.shape[0])

    @property
    def rows(self) -> int:
        """Sequences that take part."""
        return int(self.page_tables.shape[0])

    @property
    def masked_positions(self) -> Tensor | None:
        """Each token's position where some may be missing, below 0 where it is; None where all are there."""
        return self.positions if self.masked else None

    def keeping(self, tokens: Tensor) -> "PagedBatch":
        """The batch of some tokens, [tokens] bool, in their places: the others write nothing and attend to nothing.

        For the GPU's kernels, which know such tokens as padding. Which they are is known on the device alone.
        """
        return PagedBatch(
            self.positions.masked_fill(~tokens, -1),
            self.slots.masked_fill(~tokens, -1),
            self.query_starts,
            self.page_tables,
            self.max_context,
            masked=True,
        )

    def take(self, rows: Tensor) -> "PagedBatch":
        """Some rows [n] int64 of a batch in which every row has one token, as in a decode step."""
        return PagedBatch(
            self.positions.index_select(0, rows),
            self.slots.index_select(0, rows),
            self.query_starts[: len(rows) + 1],
            self.page_tables.index_select(0, rows),
            self.max_context,
        )


@dataclass(frozen=True, slots=True)
class KVBlock:
    """One block's keys and values inside the page arena: strided views, no copies.

    `page_tokens` tokens fit one page. Full format: `keys` and `values` are [pages, kv_heads, page_tokens,
    head_dim] in the model's dtype. INT4 format: `keys` and `values` are [pages, kv_heads, page_tokens,
    head_dim / 2] uint8, element 2i in the low nibble of byte i and 2i + 1 in the high one, and the params
    are [pages, kv_heads, page_tokens, 2] float16 holding (scale, minimum): value = code × scale + minimum.
    INT4 keys are stored rotated (Hadamard after RoPE, see `exeunt.kernels.write_kv`); values are not
    rotated.
    """

    keys: Tensor
    values: Tensor
    key_params: Tensor | None = None
    value_params: Tensor | None = None
    native: object = field(default=None, init=False, repr=False, compare=False)  # kernels.native keeps it

    def __reduce__(self) -> tuple[type["KVBlock"], tuple[object, ...]]:
        # `native` holds addresses of this block's tensors: a copy is described anew
        return KVBlock, (self.keys, self.values, self.key_params, self.value_params)

    @property
    def is_int4(self) -> bool:
        """Whether keys and values are INT4 codes, with params beside them."""
        return self.key_params is not None

    @property
    def page_tokens(self) -> int:
        """Tokens that fit one page."""
        return int(self.keys.shape[2])
