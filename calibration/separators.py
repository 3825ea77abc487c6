"""What stands between the documents of one text file: the tokenizer's end of text, or another model's."""

import re
from typing import Final

FOREIGN: Final = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "</s>", "<eos>")
"""Ends of text of common tokenizers: files made for one model are calibrated on for others."""
_TWICE: Final = 2  # a text that speaks of such a token once is no file of documents


def documents_of(text: str, separator: str | None) -> list[str]:
    """The documents of a file's text: between `separator`, or, where that does not occur, between a foreign one.

    A foreign one counts where lines end in it, at least twice: left in, it would be text to the model, and the whole
    file one document.
    """
    if separator and separator in text:
        return text.split(separator)
    counts = {token: _line_ends(text, token) for token in FOREIGN}
    most = max(counts, key=lambda token: counts[token])
    return text.split(most) if counts[most] >= _TWICE else [text]


def _line_ends(text: str, token: str) -> int:
    """How many lines end in `token`."""
    return len(re.findall(re.escape(token) + r"[ \t]*(?:\r?\n|\Z)", text)) if token in text else 0
