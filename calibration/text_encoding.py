"""From a transformers tokenizer to what a corpus needs of it."""

from typing import Any

from exeunt.calibration.corpus import TextEncoding
from exeunt.calibration.errors import CalibrationError
from exeunt.compression.architecture import Architecture


def text_encoding(tokenizer: Any, spec: Architecture) -> TextEncoding:
    """How `tokenizer` encodes documents for the model of `spec`.

    The end-of-text token is the tokenizer's where the model ends on it, else the model's own first one.
    """

    def encode(text: str) -> list[int]:
        # `verbose=False`: a document longer than the model's context is cut into rows, and no reason to warn.
        ids = [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False).input_ids]
        if ids and max(ids) >= spec.vocab_size:
            raise CalibrationError(
                f"The tokenizer gives the token {max(ids)}, and the model's vocabulary has {spec.vocab_size}; they "
                "do not belong together."
            )
        return ids

    end = tokenizer.eos_token_id
    if spec.eos_token_ids and end not in spec.eos_token_ids:
        end = spec.eos_token_ids[0]
    return TextEncoding(encode, _prefix(tokenizer), None if end is None else int(end))


def separator(tokenizer: Any) -> str | None:
    """The text that stands between documents of one file: the tokenizer's end of text."""
    text = tokenizer.eos_token
    return str(text) if text else None


def _prefix(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer writes in front of a text of its own accord."""
    bare = list(tokenizer("a", add_special_tokens=False).input_ids)
    dressed = list(tokenizer("a").input_ids)
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return tuple(int(token) for token in dressed[:start])
    return ()
