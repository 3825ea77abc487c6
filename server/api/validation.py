"""Says in one sentence what is wrong with a request body: the field, its value, the limit, what to do."""

import json
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final, Union, get_args, get_origin

from pydantic import BaseModel
from starlette.types import Scope

_ALIKE = 0.74  # `max_tokens` means `max_new_tokens`, and `presence_penalty` not `repetition_penalty`
_SHOWN = 60  # characters of an offending value that a message repeats

# pydantic's error types whose own wording is not a sentence with the value and the limit in it
_SENTENCES: Final = {
    "bool_type": "it must be true or false",
    "string_type": "it must be a string",
    "int_type": "it must be an integer",
    "int_from_float": "it must be an integer",
    "float_type": "it must be a number",
    "list_type": "it must be a list",
    "finite_number": "it must be a finite number",
    "too_long": "it may have at most {max_length} items",
    "too_short": "it must have at least {min_length} items",
    "string_too_long": "it may have at most {max_length} characters",
    "string_too_short": "it must have at least {min_length} characters",
    "greater_than_equal": "it must be at least {ge}",
    "greater_than": "it must be above {gt}",
    "less_than_equal": "it must be at most {le}",
    "model_type": "it must be an object",
    "model_attributes_type": "it must be an object",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """What an error response says of an invalid body."""

    message: str
    param: str | None
    code: str


def describe(errors: Sequence[Mapping[str, Any]], scope: Scope | None = None) -> Problem:
    """The sentence for the first of pydantic's errors. Unknown fields are none of them: see `unknown_field`.

    Args:
        errors: what pydantic found, each with `type`, `loc`, `msg`, `input` and perhaps `ctx`.
        scope: the request, for its content type.
    """
    error = errors[0]
    location = [part for part in error["loc"] if part != "body"]
    if not location:
        return _whole_body(error, scope)
    param = _path(location)
    if error["type"] == "missing":
        return Problem(f"The field {param} is missing.", param, "missing_field")
    return Problem(f"{param} is {shown(error['input'])}; {requirement(error)}.", param, "invalid_value")


def unknown_field(model: type[BaseModel], value: Mapping[str, Any], path: str = "") -> Problem | None:
    """The sentence for the first key of a body, or of an object in it, that its model has not; None: there is none.

    pydantic would gather an error for every such key, which costs seconds where a body consists of them.
    """
    known = model.model_fields
    for name in value:
        if name not in known:
            param = f"{path}{named(name)}"
            fields = ", ".join(sorted(known))
            guess = nearest(name, known.keys() - value.keys())
            message = f"Unknown field {param}{guess}; known are {fields}."
            return Problem(message, param, "unknown_field")
    for name, inner in value.items():
        if not isinstance(inner, dict):
            continue
        member = _inner_model(known[name].annotation)
        if member is not None:
            problem = unknown_field(member, inner, f"{path}{name}.")
            if problem is not None:
                return problem
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """Which of the `known` names is meant, if that can be guessed: in parentheses, behind a blank."""
    near = get_close_matches(name.lower(), known, n=1, cutoff=_ALIKE) if len(name) <= _SHOWN else []
    return f" (did you mean {near[0]}?)" if near else ""


def requirement(error: Mapping[str, Any]) -> str:
    """What the value must be, as the second half of a sentence without its full stop."""
    if error["type"] in ("too_short", "string_too_short") and error["ctx"]["min_length"] == 1:
        return "it must not be empty"
    if template := _SENTENCES.get(error["type"]):
        return template.format(**error.get("ctx", {}))
    message = str(error["msg"]).removeprefix("Value error, ").rstrip(".")
    for start in ("Input should be ", "Input should have "):
        if message.startswith(start):
            return f"it must {start.split()[2]} {message.removeprefix(start)}"
    return message


def shown(value: object) -> str:
    """A value as JSON, shortened; no more of it is written than is shown."""
    text = ""
    try:
        for piece in _JSON.iterencode(value[: _SHOWN + 1] if isinstance(value, str) else value):
            text += piece
            if len(text) > _SHOWN:
                break
    except (TypeError, ValueError):
        text = repr(value)
    return shortened(text)


def shortened(text: str) -> str:
    """The beginning of a text that may be of any length."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def named(name: str) -> str:
    """A field's name as a message repeats it: in quotes, and shortened, where it does not look like one."""
    return name if name.isidentifier() and len(name) <= _SHOWN else shown(name)


_JSON: Final = json.JSONEncoder(ensure_ascii=False)


def _whole_body(error: Mapping[str, Any], scope: Scope | None) -> Problem:
    if isinstance(error["input"], bytes) and scope is not None:
        types = [value.decode("latin-1") for name, value in scope["headers"] if name == b"content-type"]
        message = (
            f"The body's content type is {shortened(' and '.join(types)) or 'none'}; "
            "send JSON with the one header Content-Type: application/json."
        )
        return Problem(message, None, "content_type")
    if error["type"] == "missing":
        return Problem("The body is empty; send a JSON object.", None, "missing_body")
    return Problem(f"The body is {shown(error['input'])}; it must be a JSON object.", None, "invalid_value")


def _path(location: Sequence[str | int]) -> str:
    """`compression.early_exit.mode`, `prompt_token_ids[3]`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        found = [_inner_model(member) for member in get_args(annotation)]
        return next((model for model in found if model is not None), None)
    return None
