"""The text that modes are evaluated on: rows of tokens, and which token of each counts.

By default a text is cut into rows and every token of a row counts. Sliding windows overlap instead: each counts only
its last tokens, so that no token is judged with little before it, as is usual for the perplexity of long documents
(Press et al., arXiv 2012.15832, section 2; every token counts once).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exeunt.calibration.corpus import LEAST_ROW, Corpus, TextEncoding
from exeunt.calibration.errors import CorpusError
from exeunt.calibration.sequence_batch import SequenceBatch, batches
from exeunt.calibration.text_units import text_units

_CHARACTERS_PER_TOKEN = 12  # generous: of a long document no more is encoded than is used


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """A batch of rows; targets that do not count are -1. `scored` [T] bool, `where` [T] the tokens' blocks of text."""

    batch: SequenceBatch
    scored: Tensor
    where: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ScoredText:
    """Rows of tokens (each [n] int64); by row the first position that counts, and the token that follows it (-1: none).

    `where` [all tokens] numbers the blocks of text (`text_units`: documents, or stretches of a few), the unit of
    intervals, of which there are `blocks`.
    """

    rows: tuple[Tensor, ...]
    fresh: tuple[int, ...]
    following: tuple[int, ...]
    where: NDArray[np.int64]
    blocks: int

    @classmethod
    def of_rows(cls, rows: Sequence[Tensor], documents: Sequence[int] | None = None) -> "ScoredText":
        """Rows that all count, and that nothing follows. `documents` as in `text_units`."""
        units = text_units(rows, documents)
        return cls(tuple(rows), (0,) * len(rows), (-1,) * len(rows), units.where, units.count)

    @property
    def read(self) -> int:
        """Tokens that each pass reads."""
        return sum(map(len, self.rows))

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return self.read - sum(self.fresh)

    def batches(self, tokens: int, device: torch.device | str = "cpu") -> Iterator[ScoredBatch]:
        """The rows in order, in batches of at most `tokens` tokens, at least one row each."""
        start = row = 0
        for batch in batches(self.rows, tokens, device):
            stop, end = start + batch.tokens, row + batch.row_count
            yield self._scored(batch, row, end, self.where[start:stop])
            start, row = stop, end

    def _scored(self, batch: SequenceBatch, row: int, end: int, where: NDArray[np.int64]) -> ScoredBatch:
        device = batch.positions.device
        fresh = torch.tensor(self.fresh[row:end], device=device)[batch.rows]
        following = torch.tensor(self.following[row:end], device=device)[batch.rows]
        last = torch.ones_like(batch.rows, dtype=torch.bool)
        last[:-1] = batch.rows[1:] != batch.rows[:-1]
        scored = batch.positions >= fresh
        targets = torch.where(scored, torch.where(last, following, batch.targets), -1)
        return ScoredBatch(replace(batch, targets=targets), scored, where)


def sliding_windows(
    corpus: Corpus, encoding: TextEncoding, *, tokens: int, window: int, stride: int, seed: int
) -> ScoredText:
    """Windows of `window` tokens along the documents, each `stride` behind the one before; about `tokens` tokens count.

    A document's first window counts whole, each further one its last `stride` tokens, so that these have at least
    `window` - `stride` tokens before them. Documents come in an order drawn from `seed` and share `tokens` about
    evenly. Raises CorpusError where no document has `LEAST_ROW` tokens.
    """
    order = np.random.default_rng(seed).permutation(len(corpus.documents))
    documents = [corpus.documents[place] for place in order]
    room = window - len(encoding.prefix)
    rows: list[Tensor] = []
    fresh: list[int] = []
    following: list[int] = []
    where: list[NDArray[np.int64]] = []
    spans = list(_spans(documents, encoding, tokens, window))
    if not spans:
        raise CorpusError(f"{corpus.name} gives no document of {LEAST_ROW} tokens; give more text.")
    units = text_units([torch.tensor(ids) for ids in spans])
    ends = np.cumsum([len(ids) for ids in spans])
    for ids, numbers in zip(spans, np.split(units.where, ends[:-1]), strict=True):
        for begin, end, first in _windows(len(ids), room, min(stride, room)):
            rows.append(torch.tensor([*encoding.prefix, *ids[begin:end]]))
            fresh.append(0 if first == 0 else len(encoding.prefix) + first - begin)
            following.append(ids[end] if end < len(ids) else -1)
            where.append(np.concatenate([np.full(len(encoding.prefix), numbers[begin]), numbers[begin:end]]))
    return ScoredText(tuple(rows), tuple(fresh), tuple(following), np.concatenate(where), units.count)


def _windows(tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Begin, end and the first token that counts of every window along `tokens` tokens."""
    first, end = 0, min(window, tokens)
    while first < tokens:
        yield max(0, end - window), end, first
        first, end = end, min(end + stride, tokens)


def _spans(documents: Sequence[str], encoding: TextEncoding, quota: int, window: int) -> Iterator[list[int]]:
    """The beginnings of `documents`, in tokens, `quota` in all: evenly shared out, what short ones leave to others."""
    each = max(window, -(-quota // len(documents)))
    spare = quota
    spans: list[list[int]] = []
    for document in documents:
        spans.append(_encoded(document, encoding, each)[: min(each, spare)])
        spare -= len(spans[-1])
    for document, ids in zip(documents, spans, strict=True):
        whole = ids
        if spare > 0 and len(ids) == each:
            whole = _encoded(document, encoding, each + spare)[: each + spare]
            spare -= len(whole) - each
        if len(whole) >= LEAST_ROW:
            yield whole


def _encoded(document: str, encoding: TextEncoding, tokens: int) -> list[int]:
    """At least the first `tokens` tokens of a document, its end among them where it has no more."""
    characters = tokens * _CHARACTERS_PER_TOKEN
    ids = encoding.encode(document[:characters])
    if encoding.end is not None and len(document) <= characters:
        ids.append(encoding.end)
    return ids
