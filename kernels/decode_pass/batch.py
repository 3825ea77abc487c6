"""The tokens of a pass through a whole model: where they are, where they come in, which exits they ask."""

import ctypes
from array import array
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import accumulate

import numpy as np
from torch import Tensor

_pointer, _long = ctypes.c_void_p, ctypes.c_int64


class AtExit(IntEnum):
    """What a row does when a token of it leaves at an exit; `enum AtExit` of kernels/native/decode_pass.h.

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
    wanted: list[bool] = field(default_factory=list)  # whether the head is asked, unless an exit has spoken
    thresholds: list[float] = field(default_factory=list)  # the confidence at which it leaves
    ids: list[int] = field(default_factory=list)  # of those that come in at the front; else any
    temperatures: list[float] = field(
        default_factory=list
    )  # at which its successor is drawn, 0 for the most likely
    keys: list[int] = field(default_factory=list)  # two for each token, of that draw's noise


@dataclass(slots=True)
class PassRows:
    """R rows, lists of R; a row's tokens join it behind an exit only while others of it are on their way, or it begins
    there itself."""

    tokens: list[int] = field(default_factory=list)  # how many it has, at least one
    entries: list[int] = field(default_factory=list)  # where it begins
    at_exits: list[AtExit] = field(default_factory=list)  # what a token that leaves means for it
    pages: list[np.ndarray] = field(default_factory=list)  # int32, in the order of its positions


class _Batch(ctypes.Structure):
    """`struct PassBatch` of kernels/native/decode_pass.h."""

    _fields_ = (
        *((name, _long) for name in ("tokens", "rows", "table_width", "max_context")),
        *((name, _pointer) for name in ("numbers", "row_parts", "reals", "token_keys")),
    )


class PassBatch:
    """Tokens and rows as the native library reads them. Raises ValueError where lists are of different lengths."""

    __slots__ = ("_arrays", "_struct", "address", "draws", "max_context", "most_told", "rows", "tokens")

    def __init__(self, tokens: PassTokens, rows: PassRows, token_keys: Tensor | None = None) -> None:
        """`token_keys` [vocab] int32 are those of `draw_tokens`; None where nothing is to be drawn."""
        self.tokens, self.rows = len(tokens.positions), len(rows.tokens)
        numbers = [
            *(*tokens.positions, *tokens.slots, *tokens.entries, *tokens.asks, *tokens.wanted, *tokens.ids),
            *(*rows.entries, *rows.at_exits),
        ]
        reals = [*tokens.thresholds, *tokens.temperatures]
        lengths = (len(numbers), len(reals), len(tokens.keys), sum(rows.tokens), len(rows.pages))
        wanted = (6 * self.tokens + 2 * self.rows, *[2 * self.tokens] * 2, self.tokens, self.rows)
        if lengths != wanted:
            raise ValueError(
                f"a pass of {self.tokens} tokens and {self.rows} rows came with {lengths} numbers, reals, keys, tokens "
                f"of rows and page tables, expected {wanted}"
            )
        self.draws = token_keys is not None
        self.max_context = max(tokens.positions, default=-1) + 1
        self.most_told = sum(map(_may_be_heard, tokens.asks, tokens.wanted))
        width = max(map(len, rows.pages), default=0)
        arrays = array("q", numbers), _row_parts(rows, width, tokens.keys), array("f", reals)
        self._arrays = (arrays, token_keys)
        addresses = (some.buffer_info()[0] for some in arrays)
        keys = None if token_keys is None else token_keys.data_ptr()
        self._struct = _Batch(self.tokens, self.rows, width, self.max_context, *addresses, keys)
        self.address = ctypes.addressof(self._struct)


def _may_be_heard(asks: int, wanted: bool) -> bool:
    return wanted or asks != 0


def _row_parts(rows: PassRows, width: int, keys: list[int]) -> "array[int]":
    """Where each row's tokens begin, where the last ends, page tables [R, width], and the keys: int32."""
    parts = array("i", accumulate(rows.tokens, initial=0))
    for pages in rows.pages:
        parts.frombytes(pages.tobytes())
        if len(pages) < width:
            parts.frombytes(bytes(parts.itemsize * (width - len(pages))))
    parts.fromlist(keys)
    return parts
