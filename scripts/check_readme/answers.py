"""Answers that a page shows, compared in shape with real ones."""

import json
import re
from collections.abc import Iterator
from typing import Any

OPEN_MAPS = {"by_exit"}  # objects whose keys depend on what happened


def compare_answer(shown: str, real: str) -> list[str]:
    """How the shape of a shown answer (JSON, or lines of `data:`) differs from that of the real one."""
    if shown.lstrip().startswith("data:"):
        return _compare_events(shown, real)
    try:
        example = json.loads(_filled(shown))
    except json.JSONDecodeError as error:
        return [f"it is not JSON ({error})"]
    return list(differences(example, json.loads(real), elided=shown != _filled(shown)))


def _compare_events(shown: str, real: str) -> list[str]:
    def data(text: str) -> list[str]:
        return [line.removeprefix("data:").strip() for line in text.splitlines() if line.startswith("data:")]

    events = data(real)
    found = []
    for event in data(shown):
        if event == "[DONE]":
            if events[-1:] != ["[DONE]"]:
                found.append("the stream does not end in [DONE]")
            continue
        example, elided = json.loads(_filled(event)), event != _filled(event)
        candidates = [json.loads(other) for other in events if other.startswith("{")]
        if not any(not list(differences(example, other, elided=elided)) for other in candidates):
            found.append(f"no event is like {event[:80]}")
    return found


def _filled(shown: str) -> str:
    """A shown answer as JSON: lines of dots, dots at the end of a list, and comments are left out."""
    text = re.sub(r"^\s*(\.\.\.|…),?\s*$", "", shown, flags=re.MULTILINE)
    text = re.sub(r",?\s*(\.\.\.|…)\s*(?=[\]}])", "", text)
    text = re.sub(r"\s+//[^\n\"]*$", "", text, flags=re.MULTILINE)
    return re.sub(r",(\s*[\]}])", r"\1", text)


def differences(shown: Any, real: Any, at: str = "", *, elided: bool = False) -> Iterator[str]:
    """Where the shapes of two JSON values differ. `elided`: the shown one leaves keys out."""
    here = at or "the answer"
    if isinstance(shown, dict) and isinstance(real, dict):
        if at.rpartition(".")[2] in OPEN_MAPS:
            return
        if (missing := sorted(set(real) - set(shown))) and not elided:
            yield f"{here} lacks {', '.join(missing)}"
        if extra := sorted(set(shown) - set(real)):
            yield f"{here} has no {', '.join(extra)}"
        for key in sorted(set(shown) & set(real)):
            yield from differences(shown[key], real[key], f"{at}.{key}" if at else key, elided=elided)
    elif isinstance(shown, list) and isinstance(real, list):
        for index, item in enumerate(shown if real else []):  # like one of the real ones, if not the first
            found = (list(differences(item, other, f"{at}[{index}]", elided=elided)) for other in real)
            yield from min(found, key=len)
        if shown and not real:
            yield f"{here} is empty"
    elif _kind(shown) != _kind(real):
        yield f"{here} is {_kind(real)}, not {_kind(shown)}"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names[type(value)]
