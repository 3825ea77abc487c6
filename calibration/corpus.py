"""Texts to calibrate on: where documents come from, and how they are dealt to splits and cut into rows of tokens.

Three splits never share a document: *fit* (everything trained or fitted), *select* (every choice between
alternatives) and *certify* (held out for certificates and evaluation). It does not know what a model is.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Final, Literal

import httpx
import numpy as np
import torch
from torch import Tensor

from exeunt.calibration.errors import CorpusError
from exeunt.calibration.separators import documents_of

SplitName = Literal["fit", "select", "certify"]
SHARES: Final[dict[SplitName, float]] = {"fit": 0.48, "select": 0.17, "certify": 0.35}
LEAST_TOKENS: Final = 6000
"""Fewer tokens than this in all three splits together say nothing about anything."""
LEAST_ROW: Final = 8  # tokens; shorter rows are all beginning
HUB_PREFIX: Final = "hf:"
_PASSAGE_CHARACTERS: Final = 2000
_LONG_LINE: Final = 4 * _PASSAGE_CHARACTERS
BORDER_CHARACTERS: Final = 2000
"""Of a text that is cut in three at least so much is in no split at either border, about a row of 512 tokens: what one
split is judged on is not the next sentence of what another learned from."""
_CHARACTERS_PER_TOKEN: Final = 12  # generous, so that a cut text still fills its quota
_MOST_CHARACTERS: Final = 256 * 2**20  # of a file or data set; what follows is not read

Encode = Callable[[str], list[int]]
Passage = tuple[int, str]
"""The number of a document in its corpus, and its text or a part of it."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents and where they came from. `sha256` is that of the documents, each followed by a zero byte.

    `repeats` documents were left out because they are one of the others again.
    """

    name: str
    documents: tuple[str, ...]
    repeats: int = 0

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
    """The documents of `source`: a text file, a JSONL file, a folder of `.txt`, or `hf:NAME[:SPLIT]`.

    `separator` is the tokenizer's end-of-text, which stands between the documents of one text file (see
    `separators.documents_of` for files made with another one). Of documents that are alike to the letter, but for what
    they begin and end with of white space, one is kept: in another split it would be known by heart, and in the same
    one it is no further draw of text.

    Raises CorpusError where there is nothing there, or nothing that can be read as text.
    """
    if source.startswith(HUB_PREFIX):
        documents: Iterable[str] = _hub_documents(source.removeprefix(HUB_PREFIX))
    else:
        path = Path(source).expanduser()
        if path.is_dir():
            documents = _folder_documents(path, separator)
        elif path.is_file():
            documents = _file_documents(path, separator)
        else:
            raise CorpusError(
                f"{source} is neither a file nor a folder; give a text file, a JSONL file, a folder of .txt "
                f"files, or {HUB_PREFIX}NAME for a data set of the Hugging Face hub."
            )
    kept = tuple(text for text in (document.strip() for document in documents) if text)
    if not kept:
        raise CorpusError(f"{source} holds no text; give a file with some pages of it.")
    distinct = tuple(dict.fromkeys(kept))
    return Corpus(source, distinct, len(kept) - len(distinct))


def _file_documents(path: Path, separator: str | None) -> list[str]:
    text = _decoded(path)
    if path.suffix in (".jsonl", ".ndjson"):
        return [
            _json_text(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()
        ]
    return documents_of(text, separator)


def _decoded(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_CHARACTERS)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from error
    if (at := data.find(b"\0")) >= 0:
        raise CorpusError(f"{path} is not a text file: byte {at} is zero; give UTF-8 text.")
    whole = len(data) < _MOST_CHARACTERS
    try:
        return data.decode("utf-8-sig", errors="strict" if whole else "ignore")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded.") from error


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{path}, line {number}, is not JSON: {error.msg}.") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise CorpusError(f'{path}, line {number}, is not an object with a string field "text".')
    return str(entry["text"])


def _folder_documents(folder: Path, separator: str | None) -> Iterator[str]:
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise CorpusError(
            f"{folder} holds no .txt file; give a folder of .txt files, one or more documents each."
        )
    read = 0
    for path in paths:
        for document in _file_documents(path, separator):
            yield document
            read += len(document)
        if read >= _MOST_CHARACTERS:
            return


def _hub_documents(name: str) -> list[str]:
    data_set, _, split = name.partition(":")
    try:
        from datasets import load_dataset  # an optional dependency, and slow to import
    except ImportError as error:
        raise CorpusError(
            f"{HUB_PREFIX}{name} needs the package 'datasets': install exeunt[hub], or give a local file."
        ) from error
    try:
        entries = load_dataset(data_set, split=split or "train", streaming=True)
        return list(_hub_texts(entries))
    except KeyError as error:
        raise CorpusError(
            f'the data set {data_set} has no field "text"; give a local JSONL file instead.'
        ) from error
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CorpusError(
            f"the data set {data_set} cannot be read from the Hugging Face hub ({reason}); check the name and "
            "the network, or give a local file."
        ) from error


def _hub_texts(entries: Iterable[dict[str, object]]) -> Iterator[str]:
    read = 0
    for entry in entries:
        text = str(entry["text"])
        yield text
        read += len(text)
        if read >= _MOST_CHARACTERS // 8:  # of a stream over the network less is enough
            return


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
            f"{corpus.name} gives {sum(held.values()):,} tokens ({shown}), and calibration needs at least {least:,}; "
            f"give more text or allow more tokens.{_left_out(corpus)}"
        )
    if min(held.values()) < least * min(SHARES.values()) / 2:
        raise CorpusError(
            f"{corpus.name} gives {sum(held.values()):,} tokens, enough in all, but documents are dealt whole, which "
            f"leaves too few to one of the splits ({shown}); give more documents, or shorter ones.{_left_out(corpus)}"
        )
    return splits


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
        numbered = [(number, passage) for number, text in enumerate(documents) for passage in _passages(text)]
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


def _passages(text: str) -> Iterator[str]:
    """Runs of whole lines of at least `_PASSAGE_CHARACTERS` characters; the last may be shorter.

    Lines of several passages' length, such as those of a text without line ends, are cut first.
    """
    run: list[str] = []
    length = 0
    for line in chain.from_iterable(map(_pieces, text.splitlines(keepends=True))):
        run.append(line)
        length += len(line)
        if length >= _PASSAGE_CHARACTERS:
            yield "".join(run)
            run, length = [], 0
    if run:
        yield "".join(run)


def _pieces(line: str) -> Iterator[str]:
    """A line, or, where it is long, pieces of it of about a passage's length, cut behind a space if there is any."""
    start = 0
    while len(line) > _LONG_LINE and len(line) - start > _PASSAGE_CHARACTERS:
        stop = line.rfind(" ", start, start + _PASSAGE_CHARACTERS) + 1 or start + _PASSAGE_CHARACTERS
        yield line[start:stop]
        start = stop
    yield line[start:]


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
