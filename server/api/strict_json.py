"""JSON as it is accepted: with limits, and with every key of an object once."""

import json
from typing import Any

from pydantic_core import from_json

from exeunt.server.api.validation import shown


class RepeatedKeyError(ValueError):
    """An object has a key twice, of which one value would be ignored."""


def parse_json(text: bytes | str) -> Any:
    """What `text` says; of bytes, UTF-8. Depth and the length of numbers are limited, and Unicode must be valid.

    Raises ValueError with what is wrong, half a sentence: RepeatedKeyError for a key that is there twice.
    """
    value = from_json(text)
    colons = text.count(b":") if isinstance(text, bytes) else text.count(":")
    # every key has its colon: with no more of them than keys that are kept, none was there twice
    if colons > _keys(value):
        # a second reading for the keys alone, of what is known to be sound
        json.loads(text.decode() if isinstance(text, bytes) else text, object_pairs_hook=_unique)
    return value


def _keys(value: Any) -> int:
    """Keys of an object and of the objects that are its values; lists, which may be long, are not looked into."""
    if not isinstance(value, dict):
        return 0
    return len(value) + sum(_keys(inner) for inner in value.values() if isinstance(inner, dict))


def _unique(pairs: list[tuple[str, Any]]) -> None:
    """Raise RepeatedKeyError for a key that is there twice."""
    if len(pairs) < 2:
        return
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise RepeatedKeyError(f"the key {shown(key)} is given twice, keep one")
        seen.add(key)
