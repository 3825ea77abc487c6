"""Work that is done for a client as long as it is there."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from exeunt.server.api.errors import client_left

T = TypeVar("T")


async def while_present(http: Request, work: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
    """What `work` returns; where the client leaves first it is cancelled, and ApiError raised.

    Args:
        http: the request, whose body is read.
        work: cancelled, it does not begin what it has not begun.
        seconds: for how long it is waited for, None for ever; then it is cancelled, and TimeoutError raised.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_leaves(http.receive))
    try:
        await asyncio.wait({working, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if leaving.done():
            raise client_left(http.scope)
        raise TimeoutError
    finally:
        working.cancel()
        leaving.cancel()


async def _leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass  # the body is read already; anything else is none of our business
