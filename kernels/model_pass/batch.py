"""The tokens of a pass through a whole model: where they are, where they come in, which exits they ask."""

import ctypes
from array import array
from collections.abc import Sized
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import accumulate
from operator import or_

import numpy as np
import torch
from torch import Tensor

_pointer, _long = ctypes.c_void_p, ctypes.c_int64
_INT32 = np.dtype(np.int32)


class AtExit(IntEnum):
    """What a row does when a token of it leaves at an exit; `enum AtExit` of kernels/native/model_pass.h.

    The token's logits are the exit's in any case.
    """

    LEAVES = 0  # that token is gone, with keys and values of the skipped blocks made of the exit's state
    WAITS = 1  # all of the row's tokens that are on their way stop there
    STAYS = 2  # all of them go on to the end


@dataclass(slots=True)
class PassTokens:
    """T tokens, lists of T, those of a row together and their positions ascending: those that wait are among them."""

    positions: list[int] = field(default_factory=list)  # in their sequence
    slots: list[int] = field(default_factory=list)  # where keys and values go: page × page_tokens + offset
    entries: list[int] = field(default_factory=list)  # come in at: 0 the first block, e + 1 behind exit e
    asks: list[int] = field(default_factory=list)  # bit e: may leave at exit e
    wants_logits: list[bool] = field(default_factory=list)  # of the head, unless an exit has given them
    ids: list[int] = field(default_factory=list)  # of those that come in at the front; else any
    thresholds: list[float] = field(default_factory=list)  # the confidence at which it leaves
    temperatures: list[float] = field(default_factory=list)  # of its successor's draw, 0: the most likely
    keys: list[int] = field(default_factory=list)  # two for each token, int32, of that draw's noise


@dataclass(slots=True)
class PassRows:
    """R rows, lists of R.

    A row's tokens join it behind an exit only while others of it are on their way, or where it begins itself.
    """

    tokens: list[int] = field(default_factory=list)  # how many it has, at least one
    entries: list[int] = field(default_factory=list)  # where it begins
    at_exits: list[AtExit] = field(default_factory=list)  # what a token that leaves means for it
    pages: list[np.ndarray] = field(default_factory=list)  # int32, in the order of its positions


class _Batch(ctypes.Structure):
    """`struct PassBatch` of kernels/native/model_pass.h."""

    _fields_ = (
        *((name, _long) for name in ("tokens", "rows", "table_width", "max_context")),
        *((name, _pointer) for name in ("numbers", "row_parts", "reals", "token_keys")),
    )


class PassBatch:
    """Tokens and rows as the native library reads them.

    `token_count` and `row_count` say how many there are, `max_context` is 1 + the largest position, `most_logits` how
    many tokens may get logits, and `token_keys` those that successors are drawn with, None where none are drawn.
    """

    __slots__ = (
        "_arrays",
        "_struct",
        "address",
        "max_context",
        "most_logits",
        "row_count",
        "token_count",
        "token_keys",
    )

    def __init__(self, tokens: PassTokens, rows: PassRows, token_keys: Tensor | None = None) -> None:
        """`token_keys` [vocab] int32, dense, are those of `draw_tokens`; None where nothing is to be drawn.

        Raises ValueError where lists are of different lengths, TypeError where tables or keys are not int32.
        """
        self.token_count, self.row_count = len(tokens.positions), len(rows.tokens)
        self.token_keys = token_keys
        _check(tokens, rows, token_keys)
        self.max_context = max(tokens.positions, default=-1) + 1
        self.most_logits = sum(map(bool, map(or_, tokens.wants_logits, tokens.asks)))
        of_tokens = (*tokens.positions, *tokens.slots, *tokens.entries, *tokens.asks, *tokens.wants_logits)
        numbers = array("q", (*of_tokens, *tokens.ids, *rows.entries, *rows.at_exits))
        width = max(map(len, rows.pages), default=0)
        arrays = (
            numbers,
            _row_parts(rows, width, tokens.keys),
            array("f", tokens.thresholds + tokens.temperatures),
        )
        self._arrays = arrays  # what the struct points into
        addresses = (some.buffer_info()[0] for some in arrays)
        keys = None if token_keys is None else token_keys.data_ptr()
        self._struct = _Batch(self.token_count, self.row_count, width, self.max_context, *addresses, keys)
        self.address = ctypes.addressof(self._struct)


def _check(tokens: PassTokens, rows: PassRows, token_keys: Tensor | None) -> None:
    """Raise ValueError where lists are of different lengths, TypeError where tables or keys are not int32."""
    count, row_count = len(tokens.positions), len(rows.tokens)
    of_tokens: tuple[Sized, ...] = (
        tokens.slots,
        tokens.entries,
        tokens.asks,
        tokens.wants_logits,
        tokens.ids,
    )
    of_rows: tuple[Sized, ...] = (rows.entries, rows.at_exits, rows.pages)
    lengths = [*map(len, of_tokens), len(tokens.thresholds), len(tokens.temperatures)]
    if {*lengths, len(tokens.keys) / 2, sum(rows.tokens)} != {count}:
        raise ValueError(
            f"a pass of {count} tokens came with lists of {lengths}, {len(tokens.keys)} keys and rows of {rows.tokens} "
            "tokens"
        )
    lengths = [*map(len, of_rows)]
    if {*lengths} != {row_count}:
        raise ValueError(f"a pass of {row_count} rows came with lists of {lengths} of them")
    if not all(pages.dtype == _INT32 and len(pages) for pages in rows.pages):
        raise TypeError(
            f"page tables are {[(p.dtype, p.shape) for p in rows.pages]}, expected int32, one page or more"
        )
    if token_keys is not None and not (token_keys.dtype == torch.int32 and token_keys.is_contiguous()):
        raise TypeError(
            f"token keys are {token_keys.dtype} {list(token_keys.shape)}, expected dense int32 [vocab]"
        )


def _row_parts(rows: PassRows, width: int, keys: list[int]) -> "array[int]":
    """Where each row's tokens begin, where the last ends, page tables [R, width], and the keys: int32."""
    parts = array("i", accumulate(rows.tokens, initial=0))
    for pages in rows.pages:
        parts.frombytes(pages.tobytes())
        if len(pages) < width:
            parts.frombytes(bytes(parts.itemsize * (width - len(pages))))
    parts.fromlist(keys)
    return parts
