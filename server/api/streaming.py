"""Carries what the engine's thread says to one coroutine, notices when the client leaves, and writes event streams."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from types import TracebackType
from typing import Generic, Self, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client closed the connection before its answer was complete."""


class Inbox(Generic[T]):
    """Items from another thread, in order, for one coroutine of the loop it was made in.

    Waking a loop from another thread costs a system call, so it is done once for all items that have gathered, and
    for a plain answer only when it is complete.

    Args:
        wakes: whether an item is worth waking the coroutine for; items before it wait with it.
    """

    def __init__(self, wakes: Callable[[T], bool] = lambda _: True) -> None:
        self._loop = asyncio.get_running_loop()
        self._wakes = wakes
        self._items: deque[T] = deque()
        self._wake = asyncio.Event()
        self._woken = False
        self._abandoned = False

    def put(self, item: T) -> None:
        """Add an item; called on any thread."""
        self._items.append(item)
        if self._woken or not self._wakes(item):
            return
        self._woken = True
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going, nobody waits
            self._loop.call_soon_threadsafe(self._wake.set)

    def abandon(self) -> None:
        """The client has left: whoever waits gets ClientGoneError."""
        self._abandoned = True
        self._wake.set()

    async def next(self) -> list[T]:
        """Everything that has come since the last call, at least one item; raises ClientGoneError."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._woken = False  # before looking: an item put from here on wakes again
            if self._abandoned:
                raise ClientGoneError
            if items := self._take():
                return items

    def _take(self) -> list[T]:
        items = []
        while self._items:
            items.append(self._items.popleft())
        return items


class Attendance:
    """Watches a client while its request is under way; abandons the inbox when the client leaves."""

    def __init__(self, receive: Receive, inbox: Inbox[T]) -> None:
        self._task = asyncio.create_task(_watch(receive, inbox))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Stop watching."""
        self._task.cancel()


async def _watch(receive: Receive, inbox: Inbox[T]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass  # the body is read already; anything else is none of our business
    inbox.abandon()


def event_bytes(data: BaseModel) -> bytes:
    """One server-sent event. Fields that were not set are left out."""
    return b"data: " + data.model_dump_json(exclude_unset=True).encode() + b"\n\n"


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
