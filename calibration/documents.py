"""Where documents come from: a text file, a JSONL file, a folder of texts, a data set of the Hugging Face hub."""

import codecs
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx

from exeunt.calibration.errors import CorpusError
from exeunt.calibration.separators import documents_of

logger = logging.getLogger("exeunt.corpus")

HUB_PREFIX: Final = "hf:"
MOST_BYTES: Final = 256 * 2**20
"""Of a file, or of a folder's files together; what follows is not read."""
MOST_HUB_CHARACTERS: Final = 32 * 2**20
"""Of a data set of the hub: of a stream over the network less is enough."""
_NOT_REGULAR: Final = (
    "no regular file but a folder, a pipe, a device or a link to nothing; give a file of text"
)


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents in their order. `rows` says whether they are rows of a data set, which may be lines of a document."""

    texts: list[str]
    rows: bool


def read_documents(source: str, separator: str | None) -> Documents:
    """The documents of `source`: a text file, a JSONL file, a folder of `.txt`, or `hf:NAME[[:CONFIG]:SPLIT]`.

    `separator` is the tokenizer's end-of-text, see `separators.documents_of`. Of what is larger than is read the
    beginning is taken, and a warning logged. Raises CorpusError where there is nothing there, or nothing that can be
    read as text.
    """
    if source.startswith(HUB_PREFIX):
        return Documents(_hub_documents(source.removeprefix(HUB_PREFIX)), rows=True)
    check_there(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return Documents(list(_folder_documents(path, separator)), rows=False)
    return Documents(_file_documents(path, separator), rows=_is_jsonl(path))


def check_there(source: str) -> None:
    """Raise CorpusError where `source` is nothing that could be read; a data set of the hub is not asked for."""
    path = Path(source).expanduser()
    if source.startswith(HUB_PREFIX) or path.is_dir() or path.is_file():
        return
    if path.exists():
        raise CorpusError(f"{path} is {_NOT_REGULAR}.")
    raise CorpusError(
        f"{source} is neither a file nor a folder; give a text file, a JSONL file, a folder of .txt "
        f"files, or {HUB_PREFIX}NAME for a data set of the Hugging Face hub."
    )


def _is_jsonl(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".ndjson")


def _file_documents(path: Path, separator: str | None) -> list[str]:
    if path.suffix.lower() == ".json":
        raise CorpusError(
            f'{path} is a JSON file; give JSON Lines, a .jsonl file with an object and its field "text" on each line.'
        )
    text, whole = _decoded(path)
    if not _is_jsonl(path):
        return documents_of(text, separator)
    # At "\n" alone: str.splitlines also cuts at U+2028, U+0085 and others, which JSON strings may hold as they are.
    lines = text.split("\n")
    if not whole:
        lines.pop()  # where reading ended is no end of a line
    return [_json_text(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _decoded(path: Path) -> tuple[str, bool]:
    """The text of a file, up to `MOST_BYTES`, and whether that is all of it."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from error
    whole = len(data) <= MOST_BYTES
    if not whole:
        data = data[:MOST_BYTES]
        logger.warning("%s is longer than %s bytes, and only so many are read.", path, f"{MOST_BYTES:,}")
    if (at := data.find(b"\0")) >= 0:
        raise CorpusError(f"{path} is not a text file: byte {at} is zero; give UTF-8 text.")
    try:
        # Not final where the file goes on: a character that is cut in two there is no error.
        return codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=whole), whole
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded.") from error


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{path}, line {number}, is not JSON: {error.msg}.") from error
    except RecursionError as error:
        raise CorpusError(
            f'{path}, line {number}, is nested too deeply; give an object with a string field "text".'
        ) from error
    except ValueError as error:
        raise CorpusError(
            f"{path}, line {number}, cannot be read ({str(error).partition(';')[0]}); give an object with a string "
            'field "text".'
        ) from error
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise CorpusError(f'{path}, line {number}, is not an object with a string field "text".')
    text = str(entry["text"])
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{path}, line {number}, is no text: character {error.start} of it is {text[error.start]!a}, half of a "
            "surrogate pair; leave the line out or repair it."
        ) from error
    return text


def _folder_documents(folder: Path, separator: str | None) -> Iterator[str]:
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".txt")
    except OSError as error:
        raise CorpusError(f"{folder} cannot be read: {(error.strerror or str(error)).lower()}.") from error
    if not paths:
        raise CorpusError(
            f"{folder} holds no .txt file; give a folder of .txt files, one or more documents each."
        )
    for path in paths:
        if not path.is_file():
            raise CorpusError(f"{path} is {_NOT_REGULAR}, or leave it out.")
    read = 0
    for number, path in enumerate(paths):
        if read >= MOST_BYTES:
            logger.warning(
                "Of %s the first %d of %d files are read: they have %s characters, and %s are enough.",
                folder,
                number,
                len(paths),
                f"{read:,}",
                f"{MOST_BYTES:,}",
            )
            return
        for document in _file_documents(path, separator):
            yield document
            read += len(document)


def _hub_documents(asked: str) -> list[str]:
    name, config, split = _hub_parts(asked)
    try:
        from datasets import load_dataset  # an optional dependency, and slow to import
    except ImportError as error:
        raise CorpusError(
            f"{HUB_PREFIX}{asked} needs the package 'datasets': install exeunt[hub], or give a local file."
        ) from error
    try:
        return list(_hub_texts(asked, load_dataset(name, config, split=split, streaming=True)))
    except KeyError as error:
        raise CorpusError(
            f'the data set {name} has no field "text"; give a local JSONL file instead.'
        ) from error
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        raise CorpusError(_unread(name, str(error).strip() or type(error).__name__)) from error


def _hub_parts(asked: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of NAME, NAME:SPLIT or NAME:CONFIG:SPLIT; one part after the name is a split."""
    parts = asked.split(":")
    if len(parts) > 3 or not all(parts):
        raise CorpusError(
            f"{HUB_PREFIX}{asked} is no name of a data set; give {HUB_PREFIX}NAME, {HUB_PREFIX}NAME:SPLIT or "
            f"{HUB_PREFIX}NAME:CONFIG:SPLIT."
        )
    name, *rest = parts
    return name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train"


def _unread(name: str, told: str) -> str:
    """Why a data set cannot be read. What `told`, the package's message, says of configurations is in its 2nd line."""
    lines = [line.strip() for line in told.splitlines()]
    if lines[0].startswith("Config name is missing") and len(lines) > 1:
        return (
            f"the data set {name} has several configurations ({lines[1]}); name one and a split, as in "
            f"{HUB_PREFIX}{name}:CONFIG:train."
        )
    return (
        f"the data set {name} cannot be read from the Hugging Face hub ({lines[0]}); check the name, the "
        "configuration, the split and the network, or give a local file."
    )


def _hub_texts(asked: str, entries: Iterable[dict[str, object]]) -> Iterator[str]:
    read = 0
    for entry in entries:
        if read >= MOST_HUB_CHARACTERS:
            logger.warning(
                "Of %s%s the first %s characters are read.", HUB_PREFIX, asked, f"{MOST_HUB_CHARACTERS:,}"
            )
            return
        text = str(entry["text"])
        yield text
        read += len(text)
