"""How many bytes of text a token spells at most: what is longer than so many tokens need not be cut to be refused."""

import json
from collections.abc import Mapping
from typing import Any, Final

from tokenizers.pre_tokenizers import ByteLevel

# pre-tokenizers that cut a text and leave every byte of it in place; ByteLevel may add a space
_CUT_ONLY: Final = frozenset({"ByteLevel", "Digits", "Punctuation", "Split"})


def longest_token_bytes(tokenizer: Any) -> int | None:
    """The bytes of the longest token in UTF-8, where a text is never longer than its tokens' bytes; None elsewhere.

    That is known of byte-level BPE alone: its tokens spell every byte of a text. A normaliser may shorten a text
    without bound, an unknown token stand for any length of it, and an added token take the spaces around it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    parts = json.loads(backend.to_str())
    model, added = parts["model"], parts["added_tokens"]
    if parts["normalizer"] is not None or not _keeps_bytes(parts["pre_tokenizer"]):
        return None
    if model.get("type") != "BPE" or not model["vocab"].keys() >= set(ByteLevel.alphabet()):
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None  # what is looked up is not what the text says
    if any(token["lstrip"] or token["rstrip"] for token in added):
        return None
    # a token of the vocabulary has one character for each byte that it spells
    return max(*map(len, model["vocab"]), *(len(token["content"].encode()) for token in added))


def _keeps_bytes(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    cuts = all(step["type"] in _CUT_ONLY and step.get("behavior") != "Removed" for step in steps)
    return cuts and any(step["type"] == "ByteLevel" for step in steps)
