"""Request bodies: how large they may be."""

import asyncio
import contextlib
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from exeunt.server.api.errors import ApiError

DISCARD_S: Final = 2.0  # how long a body that is refused is read on
DISCARD_TIMES: Final = 4  # and how much of it, in limits


class BodyLimit:
    """Refuses bodies of more than `max_bytes`, announced or sent piece by piece without a length."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._max_bytes:
            await self._discard(receive)
            raise self._too_large(f"{int(announced)} bytes")
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                if message.get("more_body", False):  # of a body that is complete nothing more comes
                    await self._discard(receive)
                raise self._too_large(f"more than {self._max_bytes} bytes")
            return message

        await self._app(scope, limited, send)

    async def _discard(self, receive: Receive) -> None:
        """Read on for a while: a connection closed on a client that still sends is reset, and the refusal is lost."""
        left = DISCARD_TIMES * self._max_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_S):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        return

    def _too_large(self, size: str) -> ApiError:
        message = f"The body has {size}; the limit is {self._max_bytes} bytes (--max-body-bytes), send a smaller one."
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
