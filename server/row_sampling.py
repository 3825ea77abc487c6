"""How one row's next token is drawn: what was asked for, and the keys of its noise."""

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from exeunt.server.request import SamplingParams

GREEDY_BELOW: Final = 1e-5  # temperatures under this are greedy: dividing by them only overflows
_MASK64: Final = (1 << 64) - 1


class RowSampling(NamedTuple):
    """What one row of logits needs for its draw.

    `position` is the token's place in its answer: 0 for the first generated token, whatever the prompt's
    length. `history` holds the ids of prompt and generated tokens up to here (drafts included) in any order,
    a set or an array of integers will do; it is read only when there is a repetition penalty.
    """

    params: SamplingParams
    choice: int
    position: int
    history: Collection[int] | np.ndarray = ()

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, with no noise."""
        return self.params.temperature < GREEDY_BELOW

    def masks_eos(self) -> bool:
        """Whether end-of-text is ruled out for this token."""
        return self.position < self.params.min_new_tokens and not self.params.ignore_eos


class PlainDraw(NamedTuple):
    """A draw from logits as they are: its temperature, 0 for the most likely token, and the two keys of its noise."""

    temperature: float
    first_key: int
    second_key: int


_GREEDY: Final = PlainDraw(0.0, 0, 0)


def plain_draw(row: RowSampling, vocab_size: int, *, ends: bool) -> PlainDraw | None:
    """How a row's token is drawn where none of steps 1, 2, 4 and 5 change its logits; None where one does.

    `ends` says whether the model has end-of-text ids.
    """
    params = row.params
    if params.repetition_penalty != 1.0 or (ends and row.masks_eos()):
        return None
    if row.greedy:
        return _GREEDY
    return None if truncates(params, vocab_size) else PlainDraw(float(params.temperature), *_row_key(row))


def truncates(params: SamplingParams, vocab_size: int) -> bool:
    """Whether top-k or top-p rules anything out."""
    return 0 < params.top_k < vocab_size or params.top_p < 1.0


def row_keys(rows: Sequence[RowSampling]) -> Tensor:
    """What the rows' noise is keyed by, [rows, 2] int32: a hash of (seed, choice, position); 0 where greedy."""
    return torch.from_numpy(np.array([(0, 0) if row.greedy else _row_key(row) for row in rows], np.int32))


def _row_key(row: RowSampling) -> tuple[int, int]:
    """Two int32 keys from (seed, choice, position)."""
    key = _mix64(_answer_key(row.params.seed, row.choice) ^ (row.position & _MASK64))
    return _signed32(key & 0xFFFFFFFF), _signed32(key >> 32)


@lru_cache(maxsize=4096)
def _answer_key(seed: int, choice: int) -> int:
    """The part of the hash that all tokens of an answer share."""
    return _mix64(_mix64(seed & _MASK64) ^ (choice & _MASK64))


def _mix64(value: int) -> int:
    """One step of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit numbers."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _signed32(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


@lru_cache(maxsize=8)
def token_keys(vocab_size: int, device: torch.device) -> Tensor:
    """A scattered int32 key per token id [vocab_size], `_mix64`'s upper half: close ids share no bits."""
    keys = np.arange(vocab_size, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys ^= keys >> np.uint64(31)
    return torch.from_numpy((keys >> np.uint64(32)).astype(np.uint32).view(np.int32)).to(device)
