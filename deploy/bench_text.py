"""Prompts for benchmarks: passages of the text that ships with the packaged model."""

from collections.abc import Callable

from exeunt.deploy import packaged_model

_CHARACTERS_PER_TOKEN = (
    12  # more than any tokenizer makes of English, so that one passage is enough for a prompt
)


def cut_prompts(encode: Callable[[str], list[int]], count: int, tokens: int) -> list[list[int]]:
    """`count` prompts of exactly `tokens` tokens, from as many places of the text."""
    text = (packaged_model.path() / packaged_model.CALIBRATION_TEXT).read_text(encoding="utf-8")
    width = tokens * _CHARACTERS_PER_TOKEN
    text *= 1 + width // len(text)
    stride = max(1, (len(text) - width) // count)
    return [encode(text[at : at + width])[:tokens] for at in range(0, stride * count, stride)]
