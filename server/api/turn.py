"""A request's turn at what does one thing after the other: the tokenizer, or the thread that reads large bodies.

It is waited for as long as the request's client is there and its time is not over.
"""

import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from exeunt.server.api.arrival import arrival_of
from exeunt.server.api.errors import ApiError
from exeunt.server.api.presence import while_present
from exeunt.server.api.service import Service

T = TypeVar("T")


async def in_turn(
    http: Request,
    service: Service,
    work: Coroutine[Any, Any, T],
    *,
    brief: bool,
    where: str = "at the tokenizer",
) -> T:
    """What `work` returns, which may have to wait for its turn `where` an error says.

    `brief` work is not watched, which takes longer than it does. Raises ApiError where the client leaves first (499)
    and where the request's time is over (504); what has not begun by then is not done.
    """
    if brief:
        return await work
    left = arrival_of(http.scope) + service.request_timeout_s - time.monotonic()
    try:
        return await while_present(http, work, left)
    except TimeoutError:
        raise _timed_out(service.request_timeout_s, where) from None


def _timed_out(timeout_s: float, where: str) -> ApiError:
    message = (
        f"The request timed out {where}, after the {timeout_s:g} s that it may take; "
        "send less at once, try again later or raise --request-timeout."
    )
    return ApiError(504, message, code="timeout")
