"""Says in one sentence what is wrong with a request body: the field, its value, the limit, what to do."""

import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Union, get_args, get_origin

from pydantic import BaseModel
from starlette.types import Scope

_SHOWN = 60  # characters of an offending value that a message repeats

# pydantic's error types whose own wording is not a sentence with the value and the limit in it
_SENTENCES: Final = {
    "bool_type": "it must be true or false",
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
    """The sentence for the first of pydantic's errors.

    Args:
        errors: what pydantic found, each with `type`, `loc`, `msg`, `input` and perhaps `ctx`.
        scope: the request, for the known fields of its body and its content type.
    """
    error = errors[0]
    location = [part for part in error["loc"] if part != "body"]
    if not location and error["type"] != "json_invalid":
        return _whole_body(error, scope)
    if error["type"] == "json_invalid":
        return Problem(f"The body is not valid JSON: {error['ctx']['error']}.", None, "malformed_json")
    param = _path(location)
    if error["type"] == "extra_forbidden":
        known = _known_fields(_body_model(scope), location[:-1])
        hint = f"; known are {', '.join(known)}" if known else ""
        return Problem(f"Unknown field {param}{hint}.", param, "unknown_field")
    if error["type"] == "missing":
        return Problem(f"The field {param} is missing.", param, "missing_field")
    return Problem(f"{param} is {shown(error['input'])}; {requirement(error)}.", param, "invalid_value")


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
    """A value as JSON, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _whole_body(error: Mapping[str, Any], scope: Scope | None) -> Problem:
    if isinstance(error["input"], bytes) and scope is not None:
        sent = dict(scope["headers"]).get(b"content-type", b"none").decode("latin-1")
        message = (
            f"The body's content type is {sent}; send JSON with the header Content-Type: application/json."
        )
        return Problem(message, None, "content_type")
    if error["type"] == "missing":
        return Problem("The body is empty; send a JSON object.", None, "missing_body")
    return Problem(f"The body is {shown(error['input'])}; it must be a JSON object.", None, "invalid_value")


def _path(location: Sequence[str | int]) -> str:
    """`compression.early_exit.mode`, `prompt_token_ids[3]`; the names of union members are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part[:1].isupper() and "[" not in part:
            path += f".{part}" if path else part
    return path


def _body_model(scope: Scope | None) -> type[BaseModel] | None:
    route = scope.get("route") if scope is not None else None
    field = getattr(route, "body_field", None)
    model = getattr(getattr(field, "field_info", None), "annotation", None)
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def _known_fields(model: type[BaseModel] | None, location: Sequence[str | int]) -> list[str]:
    for part in location:
        if model is None:
            return []
        if part in model.model_fields:
            model = _inner_model(model.model_fields[str(part)].annotation)
    return sorted(model.model_fields) if model is not None else []


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        found = [_inner_model(member) for member in get_args(annotation)]
        return next((model for model in found if model is not None), None)
    return None
