"""Writes server-sent events."""

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

from pydantic import BaseModel, TypeAdapter
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from exeunt.server.api.inbox import ClientGoneError

DONE: Final = b"data: [DONE]\n\n"
_PLAIN: Final[TypeAdapter[dict[str, Any]]] = TypeAdapter(dict[str, Any])


def event_bytes(data: BaseModel) -> bytes:
    """One server-sent event. Fields that were not set are left out."""
    return b"data: " + data.model_dump_json(exclude_unset=True).encode() + b"\n\n"


def plain_event_bytes(data: dict[str, Any]) -> bytes:
    """One server-sent event of plain values: no model is made for what is written and forgotten."""
    return b"data: " + _PLAIN.dump_json(data) + b"\n\n"


class EventStreamResponse(Response):
    """Server-sent events from an iterator of whole events.

    Args:
        events: the encoded events; may raise ClientGoneError, which ends the response silently.
        on_end: called once when the response is over, however it ended.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        on_end: Callable[[], None],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        unbuffered = {"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})}
        super().__init__(None, headers=unbuffered)
        del self.headers["content-length"]
        self._events = events
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGoneError:
            return
        finally:
            self._on_end()
