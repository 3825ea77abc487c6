"""Texts to calibrate on: where documents come from, and how they are dealt to splits and cut into rows of tokens.

Three splits never share a document: *fit* (everything trained or fitted), *select* (every choice between
alternatives) and *certify* (held out for certificates and evaluation). It does not know what a model is.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from exeunt.calibration.documents import read_documents
from exeunt.calibration.errors import CorpusError
from exeunt.calibration.passages import PASSAGE_CHARACTERS, joined, text_passages

SplitName = Literal["fit", "select", "certify"]
SHARES: Final[dict[SplitName, float]] = {"fit": 0.48, "select": 0.17, "certify": 0.35}
LEAST_TOKENS: Final = 6000
"""Fewer tokens than this in all three splits together say nothing about anything."""
LEAST_ROW: Final = 8  # tokens; shorter rows are all beginning
BORDER_CHARACTERS: Final = 2000
"""Of a text that is cut in three at least so much is in no split at either border, about a row of 512 tokens: what one
split is judged on is not the next sentence of what another learned from."""
_CHARACTERS_PER_TOKEN: Final = 12  # generous, so that a cut text still fills its quota

Encode = Callable[[str], list[int]]
Passage = tuple[int, str]
"""The number of a document in its corpus, and its text or a part of it."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents and where they came from. `sha256` is that of the documents, each followed by a zero byte.

    `repeats` documents were left out because they are one of the others again. Where rows of a data set were so short
    that they were joined, `documents` are passages of neighbours, and `rows` says how many there were (0: not joined).
    """

    name: str
    documents: tuple[str, ...]
    repeats: int = 0
    rows: int = 0

    def in_words(self) -> str:
        """What there is, what was left out, and what was joined."""
        count = len(self.documents)
        found = "1 document" if count == 1 else f"{count:,} documents"
        if self.rows:
            found = (
                f"{self.rows:,} rows, so short that neighbours were joined to {count:,} passages of about "
                f"{PASSAGE_CHARACTERS:,} characters, which are dealt as documents are"
            )
        return found + (f" ({self.repeats:,} repeats of one left out)" if self.repeats else "")

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of the documents."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.encode())
            digest.update(b"\0")
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class TextEncoding:
    """How a document becomes tokens: the tokenizer's `encode`, what every row begins with, how a document ends.

    `prefix` is the beginning-of-sequence token where the tokenizer writes one; rows cut from inside a document
    get it too, because a model that was trained with it needs it. `end` is None where there is no such token.
    """

    encode: Encode  # without special tokens
    prefix: tuple[int, ...]
    end: int | None


@dataclass(frozen=True, slots=True)
class Splits:
    """Rows of tokens (each [tokens] int64) of the three splits.

    `documents` has by split the number of the document, in the corpus, that each of its rows was cut from.
    """

    fit: tuple[Tensor, ...]
    select: tuple[Tensor, ...]
    certify: tuple[Tensor, ...]
    documents: Mapping[SplitName, tuple[int, ...]] = field(default_factory=dict)

    def tokens(self) -> dict[str, int]:
        """Tokens in each split."""
        return {name: sum(len(row) for row in getattr(self, name)) for name in SHARES}


def read_corpus(source: str, separator: str | None) -> Corpus:
    """The documents of `source`: a text file, a JSONL file, a folder of `.txt`, or `hf:NAME[[:CONFIG]:SPLIT]`.

    `separator` is the tokenizer's end-of-text, which stands between the documents of one text file (see
    `separators.documents_of` for files made with another one). Rows of a data set or of a JSONL file that are no
    documents but lines are joined to passages (see `passages.joined`). Of documents that are alike to the letter, but
    for what they begin and end with of white space, one is kept: in another split it would be known by heart, and in
    the same one it is no further draw of text.

    Raises CorpusError where there is nothing there, or nothing that can be read as text.
    """
    found = read_documents(source, separator)
    kept = tuple(text for text in (document.strip() for document in found.texts) if text)
    if not kept:
        raise CorpusError(f"{source} holds no text; give a file with some pages of it.")
    distinct = tuple(dict.fromkeys(kept))
    dealt = tuple(joined(distinct)) if found.rows else distinct
    of_rows = len(distinct) if dealt != distinct else 0
    return Corpus(source, dealt, len(kept) - len(distinct), of_rows)


def split_corpus(
    corpus: Corpus,
    encoding: TextEncoding,
    *,
    tokens: int,
    row_tokens: int,
    seed: int,
    least: int = LEAST_TOKENS,
) -> Splits:
    """Deal the corpus's documents to the three splits and cut them into rows of at most `row_tokens` tokens.

    At most `tokens` tokens are kept, shared out by `SHARES`. Documents are dealt whole, in an order drawn from
    `seed`; a corpus of one or two documents is cut at paragraphs, and its beginning, middle and end become the
    three splits, with `BORDER_CHARACTERS` or more between two of them that are in none.

    Raises CorpusError where the three splits together hold fewer than `least` tokens.
    """
    dealt = _deal(corpus.documents, seed)
    rows = {
        name: _rows(dealt[name], encoding, quota=round(tokens * share), row_tokens=row_tokens)
        for name, share in SHARES.items()
    }
    fit, select, certify = (tuple(row for _, row in rows[name]) for name in SHARES)
    documents = {name: tuple(number for number, _ in rows[name]) for name in SHARES}
    splits = Splits(fit, select, certify, documents)
    held = splits.tokens()
    shown = ", ".join(f"{count:,} to {name}" for name, count in held.items())
    if sum(held.values()) < least:
        raise CorpusError(
            f"{corpus.name} {_given(corpus, encoding, sum(held.values()), shown)}. Calibration needs at least "
            f"{least:,} in the splits; give more text or allow more tokens.{_left_out(corpus)}"
        )
    if min(held.values()) < least * min(SHARES.values()) / 2:
        raise CorpusError(
            f"{corpus.name} gives {sum(held.values()):,} tokens, enough in all, but documents are dealt whole, which "
            f"leaves too few to one of the splits ({shown}); give more documents, or shorter ones.{_left_out(corpus)}"
        )
    return splits


def _given(corpus: Corpus, encoding: TextEncoding, held: int, shown: str) -> str:
    """How many tokens came to the splits, and of a short text that was cut in three, of how many."""
    characters = sum(len(text) for text in corpus.documents)
    if len(corpus.documents) >= len(SHARES) or characters > _CHARACTERS_PER_TOKEN * LEAST_TOKENS:
        return f"gives {held:,} tokens ({shown})"
    there = sum(len(encoding.encode(text)) for text in corpus.documents)
    return (
        f"has {there:,} tokens, but gives the splits {held:,} ({shown}): text of fewer than {len(SHARES)} documents is "
        f"cut in three, with {BORDER_CHARACTERS:,} characters or more left out at both borders"
    )


def _left_out(corpus: Corpus) -> str:
    """That documents were repeats, which one may not expect where there are too few."""
    return f" {corpus.repeats:,} more repeat one of its documents and do not count." if corpus.repeats else ""


def rows_of(
    corpus: Corpus, encoding: TextEncoding, *, tokens: int, row_tokens: int, seed: int
) -> tuple[Tensor, ...]:
    """Rows of at most `row_tokens` tokens from the corpus's documents, `tokens` in all at most.

    Documents come in an order drawn from `seed`: neighbours in a file are often alike, and its beginning need not be
    like the rest. Of a single document it is the beginning. Raises CorpusError where no row has `LEAST_ROW` tokens.
    """
    rows = numbered_rows_of(corpus, encoding, tokens=tokens, row_tokens=row_tokens, seed=seed)
    return tuple(row for _, row in rows)


def numbered_rows_of(
    corpus: Corpus, encoding: TextEncoding, *, tokens: int, row_tokens: int, seed: int
) -> tuple[tuple[int, Tensor], ...]:
    """What `rows_of` returns, each row with the number of its document."""
    order = np.random.default_rng(seed).permutation(len(corpus.documents))
    shuffled = [(int(i), corpus.documents[i]) for i in order]
    rows = _rows(shuffled, encoding, quota=tokens, row_tokens=row_tokens)
    if not rows:
        raise CorpusError(f"{corpus.name} gives no row of {LEAST_ROW} tokens; give more text.")
    return tuple(rows)


def _deal(documents: Sequence[str], seed: int) -> dict[SplitName, list[Passage]]:
    if len(documents) < len(SHARES):
        numbered = [
            (number, passage) for number, text in enumerate(documents) for passage in text_passages(text)
        ]
        return _deal_in_order(numbered)
    order = np.random.default_rng(seed).permutation(len(documents))
    total = sum(len(text) for text in documents)
    missing = {name: share * total for name, share in SHARES.items()}  # characters
    dealt: dict[SplitName, list[Passage]] = {name: [] for name in SHARES}
    for index in order:
        name = max(missing, key=lambda split: missing[split])
        dealt[name].append((int(index), documents[index]))
        missing[name] -= len(documents[index])
    return dealt


def _deal_in_order(passages: list[Passage]) -> dict[SplitName, list[Passage]]:
    """Beginning, middle and end of a text, so that neighbours are in one split, and a gap at the two borders.

    The gaps are taken from the two splits that have more than the middle one.
    """
    total = sum(len(text) for _, text in passages)
    dealt: dict[SplitName, list[Passage]] = {name: [] for name in SHARES}
    names, bounds = list(SHARES), np.cumsum(list(SHARES.values())) * total
    seen = 0
    for number, text in passages:
        place = min(int(np.searchsorted(bounds, seen, side="right")), len(names) - 1)
        dealt[names[place]].append((number, text))
        seen += len(text)
    first, _, last = names
    dealt[first] = dealt[first][: len(dealt[first]) - _passages_of(BORDER_CHARACTERS, dealt[first][::-1])]
    dealt[last] = dealt[last][_passages_of(BORDER_CHARACTERS, dealt[last]) :]
    return dealt


def _passages_of(characters: int, passages: Sequence[Passage]) -> int:
    """How many of `passages`, from the first, it takes to hold `characters` characters; all where they do not."""
    held = np.cumsum([len(text) for _, text in passages])
    return min(int(np.searchsorted(held, characters)) + 1, len(passages))


def _rows(
    documents: Sequence[Passage], encoding: TextEncoding, *, quota: int, row_tokens: int
) -> list[tuple[int, Tensor]]:
    """Rows from every document about evenly, until there are `quota` tokens, each with its document's number.

    Long documents are not read whole.
    """
    if not documents:
        return []
    each = max(row_tokens, -(-quota // len(documents)))  # tokens of one document in the first round
    rows: list[tuple[int, Tensor]] = []
    held = 0
    for limit in (each, quota):
        begin = 0 if limit == each else each
        for number, document in documents:
            for row in _document_rows(
                document, encoding, begin, min(limit, begin + quota - held), row_tokens
            ):
                rows.append((number, row))
                held += len(row)
            if quota - held < LEAST_ROW:
                return rows
        if each >= quota:
            break
    return rows


def _document_rows(
    document: str, encoding: TextEncoding, begin: int, stop: int, row_tokens: int
) -> Iterator[Tensor]:
    """Rows of a document's tokens `begin` to `stop` - 1."""
    characters = stop * _CHARACTERS_PER_TOKEN
    ids = encoding.encode(document[:characters])
    if encoding.end is not None and len(document) <= characters:
        ids.append(encoding.end)
    room = row_tokens - len(encoding.prefix)
    pieces = iter(ids[begin:stop])
    while piece := list(islice(pieces, room)):
        if len(piece) >= LEAST_ROW:
            yield torch.tensor([*encoding.prefix, *piece], dtype=torch.int64)
