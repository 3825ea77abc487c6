"""How many tokens a request may have, and which: checked on lists of ids, and on texts that were cut."""

from collections.abc import Sequence

from exeunt.server.api.errors import ApiError, bad_request
from exeunt.server.api.validation import shown


def counted(count: int, noun: str) -> str:
    """`1 token`, `2 tokens`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def check_prompt(tokens: int, limit: int, field: str) -> None:
    """Raise ApiError 400 for a prompt that leaves no room for an answer."""
    if tokens >= limit:
        raise _too_long(
            f"The prompt has {counted(tokens, 'token')}; the limit for prompt and answer together is {limit}: "
            "shorten it.",
            field,
        )


def check_together(prompt_tokens: int, max_new_tokens: int, limit: int) -> None:
    """Raise ApiError 400 for a prompt and an answer that are too long together."""
    if prompt_tokens + max_new_tokens > limit:
        raise _too_long(
            f"The prompt has {counted(prompt_tokens, 'token')} and max_new_tokens is {max_new_tokens}; the limit for "
            f"both together is {limit}: shorten the prompt or ask for at most "
            f"{counted(limit - prompt_tokens, 'new token')}.",
            "max_new_tokens",
        )


def check_text(tokens: int, limit: int, field: str) -> None:
    """Raise ApiError 400 for a text that is too long to be scored."""
    if tokens > limit:
        raise _too_long(
            f"The text has {counted(tokens, 'token')}; the limit is {limit}, score it in parts.", field
        )


def check_bytes(text: str, limit: int, longest_token: int | None, field: str) -> None:
    """Raise ApiError 400 for a text that must have more than `limit` tokens, whatever it is cut into.

    `longest_token`: bytes that a token spells at most; None: not known, and nothing is refused.
    """
    if longest_token is None or len(text) * 4 <= limit * longest_token:  # a character has four bytes at most
        return
    size = len(text.encode())
    if size > limit * longest_token:
        raise _too_long(
            f"{field} has {size} bytes; the limit is {limit} tokens, which spell at most {limit * longest_token} "
            "bytes: shorten it.",
            field,
        )


def check_ids(ids: Sequence[int], vocab_size: int, name: str) -> None:
    """Raise ApiError 400 for a token id beyond the vocabulary."""
    if not ids or max(ids) < vocab_size:
        return
    index, token_id = next((i, token_id) for i, token_id in enumerate(ids) if token_id >= vocab_size)
    raise bad_request(
        f"{name}[{index}] is {shown(token_id)}; the vocabulary has the ids 0 to {vocab_size - 1}.",
        param=f"{name}[{index}]",
    )


def _too_long(message: str, field: str) -> ApiError:
    return bad_request(message, code="too_long", param=field)
