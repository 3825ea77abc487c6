"""What stands between the documents of one text file: the tokenizer's end of text, or another model's."""

import re
from typing import Final

FOREIGN: Final = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "</s>", "<eos>")
"""Ends of text of common tokenizers: files made for one model are calibrated on for others."""
_TWICE: Final = 2  # a text that speaks of such a token once is no file of documents
_MOSTLY: Final = 0.5  # of its occurrences stand at line ends; markup has it anywhere


def documents_of(text: str, separator: str | None) -> list[str]:
    """The documents of a file's text: between `separator`, or, where that does not occur, between a foreign one.

    A foreign one counts where it mostly stands at the end of a line, at least twice: left in, it would be text to the
    model, and the whole file one document. It is cut at line ends only.
    """
    if separator and separator in text:
        return text.split(separator)
    most = max(FOREIGN, key=text.count)
    count = text.count(most)
    if count < _TWICE:
        return [text]
    documents = re.split(re.escape(most) + r"[ \t]*(?:\r?\n|\Z)", text)
    cuts = len(documents) - 1
    return documents if cuts >= max(_TWICE, _MOSTLY * count) else [text]
