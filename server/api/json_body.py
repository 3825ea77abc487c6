"""A body's way from bytes to checked fields. Knows no event loop: what is large is read on a thread."""

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from exeunt.server.api.errors import ApiError, bad_request
from exeunt.server.api.strict_json import parse_json
from exeunt.server.api.token_limits import check_prompt, check_text
from exeunt.server.api.validation import Problem, describe, unknown_field

B = TypeVar("B", bound=BaseModel)

_CHECKS_OF_LENGTH: Final[Mapping[str, Callable[[int, int, str], None]]] = {
    "prompt_token_ids": check_prompt,
    "token_ids": check_text,
}
"""By the field that holds token ids, what says that there are too many."""


def read_body(content: bytes, model: type[B], max_model_len: int) -> B:
    """The body that `content` is; raises ApiError 400 with the first thing wrong.

    What would take long to say in full is refused by its size or at its first fault: unknown fields, and lists of more
    ids than `max_model_len`, before a value is looked at.
    """
    try:
        value = parse_json(content)
    except ValueError as error:
        raise bad_request(f"The body is not valid JSON: {error}.", code="malformed_json") from error
    if isinstance(value, dict):
        if problem := unknown_field(model, value):
            raise _refusal(problem)
        _check_lengths(value, max_model_len)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _refusal(describe(error.errors(include_url=False))) from error


def _check_lengths(value: Mapping[str, Any], max_model_len: int) -> None:
    for field, check in _CHECKS_OF_LENGTH.items():
        ids = value.get(field)
        if isinstance(ids, list):
            check(len(ids), max_model_len, field)


def _refusal(problem: Problem) -> ApiError:
    return bad_request(problem.message, code=problem.code, param=problem.param)
