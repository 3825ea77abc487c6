"""Novels and TinyStories as documents, with whole novels and a hashed share of the stories held out."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SEPARATOR = "<|endoftext|>"
HELD_OUT_NOVELS = frozenset(
    {
        "Burnett_Garden_1911",
        "Doyle_Hound_1902",
        "Forster_View_1908",
        "Trollope_Warden_1855",
        "Woolf_Night_1919",
    }
)
HELD_OUT_STORIES = 20
"""One story in so many is held out, chosen by a hash of its text, so that copies fall on the same side."""
DOCUMENT_CHARACTERS = 6000
_QUOTES = str.maketrans(
    {
        "\u201c": '"',
        "\u201d": '"',
        "\u2018": "'",
        "\u2019": "'",
        "\u2014": " - ",
        "\u2013": "-",
        "\u2026": "...",
    }
    | {"\u00ab": '"', "\u00bb": '"', "\u00a0": " ", "\ufeff": "", "\u201e": '"', "\u201a": "'"}
)
_SPACES = re.compile(r"[ \t\f\v]+")


@dataclass(frozen=True, slots=True)
class Split:
    """Documents of one source: those to train on and those never trained on."""

    train: list[str]
    held_out: list[str]


def clean_text(text: str) -> str:
    """Return the text with plain quotes and dashes, one space between words, one newline between paragraphs."""
    lines = (_SPACES.sub(" ", line).strip() for line in text.translate(_QUOTES).splitlines())
    return "\n".join(line for line in lines if line)


def read_stories(path: Path) -> Split:
    """Return the stories of a file in which ``SEPARATOR`` stands between them."""
    split = Split([], [])
    for raw in path.read_text(encoding="utf-8", errors="replace").split(SEPARATOR):
        story = clean_text(raw)
        if len(story) < 60 or "\ufffd" in story:
            continue
        digest = int.from_bytes(hashlib.sha256(story.encode()).digest()[:8], "big")
        (split.held_out if digest % HELD_OUT_STORIES == 0 else split.train).append(story)
    return split


def read_novels(folder: Path) -> Split:
    """Return the novels of a folder (``*.txt``), cut into documents; ``HELD_OUT_NOVELS`` are held out whole."""
    split = Split([], [])
    for path in sorted(folder.glob("*.txt")):
        side = split.held_out if path.stem in HELD_OUT_NOVELS else split.train
        side.extend(cut_documents(clean_text(path.read_text(encoding="utf-8", errors="replace"))))
    return split


def cut_documents(text: str, characters: int = DOCUMENT_CHARACTERS) -> Iterator[str]:
    """Yield runs of whole paragraphs of at least ``characters`` characters (the last one may be shorter)."""
    run: list[str] = []
    length = 0
    for paragraph in text.split("\n"):
        run.append(paragraph)
        length += len(paragraph) + 1
        if length >= characters:
            yield "\n".join(run)
            run, length = [], 0
    if run:
        yield "\n".join(run)
