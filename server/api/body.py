"""Request bodies: how large they may be and what counts as JSON."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine
from typing import Any, Final

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from exeunt.server.api.errors import CLIENT_CLOSED_REQUEST, ApiError
from exeunt.server.api.outcome import outcome_of
from exeunt.server.api.strict_json import parse_json

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
        message = f"The body has {size}; the limit is {self._max_bytes} bytes (--max-body-bytes)."
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


class StrictJSONRequest(Request):
    """A request whose JSON is parsed as `strict_json` does."""

    async def body(self) -> bytes:
        """The whole body; raises ApiError where the client left before it had sent it, which is counted as that."""
        try:
            return await super().body()
        except ClientDisconnect as error:
            outcome_of(self.scope).client_left()
            raise ApiError(
                CLIENT_CLOSED_REQUEST, "The client left before its body was complete.", code="client_left"
            ) from error

    async def json(self) -> Any:
        """The parsed body; raises JSONDecodeError."""
        body = await self.body()
        try:
            return parse_json(body)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


class StrictJSONRoute(APIRoute):
    """A route that parses its body as `StrictJSONRequest` does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The framework's handler around our request."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictJSONRequest(request.scope, request.receive))

        return handle_strictly
