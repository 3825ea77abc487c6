"""Carries what the engine's thread says to one coroutine, and notices when its client leaves or its time is over."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Final, Generic, Self, TypeVar
from weakref import WeakKeyDictionary, ref

from starlette.types import Receive

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed the connection before its answer was complete."""


class Inbox(Generic[T]):
    """Items from another thread, in order, for one coroutine of the loop it was made in.

    Args:
        wakes: whether an item is worth waking the coroutine for; items before it wait with it.
    """

    def __init__(self, wakes: Callable[[T], bool] = lambda _: True) -> None:
        self._alarm = _alarm_of(asyncio.get_running_loop())
        self._wakes = wakes
        self._items: deque[T] = deque()
        self._wake = asyncio.Event()
        self._woken = False
        self._abandoned = False
        self._late = False

    def put(self, item: T) -> None:
        """Add an item; called on any thread."""
        self._items.append(item)
        if self._woken or not self._wakes(item):
            return
        self._woken = True
        self._alarm.ring(self._wake)

    def abandon(self) -> None:
        """The client has left: whoever waits gets ClientGoneError."""
        self._abandoned = True
        self._wake.set()

    def expire(self) -> None:
        """It is too late: whoever waits, and finds nothing, gets TimeoutError."""
        self._late = True
        self._wake.set()

    async def next(self) -> list[T]:
        """Everything that has come since the last call, at least one item; raises ClientGoneError, TimeoutError."""
        while True:
            if not self._late:
                await self._wake.wait()
            self._wake.clear()
            self._woken = False  # before looking: an item put from here on wakes again
            if self._abandoned:
                raise ClientGoneError
            if items := self._take():
                return items
            if self._late:
                raise TimeoutError

    def _take(self) -> list[T]:
        items = []
        while self._items:
            items.append(self._items.popleft())
        return items


class _Alarm:
    """Sets events of one loop from another thread.

    Waking a loop from another thread costs a system call, so it is done once for all that has gathered since the loop
    last looked: one for a tick of the engine, however many streams it feeds.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)  # whose alarms are kept only as long as it is
        self._due: deque[asyncio.Event] = deque()
        self._called = False

    def ring(self, event: asyncio.Event) -> None:
        """Set an event soon; called on any thread."""
        self._due.append(event)
        if self._called:
            return
        self._called = True
        if (loop := self._loop()) is None:
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going, nobody waits
            loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        self._called = False  # before looking: what is rung from here on calls again
        while self._due:
            self._due.popleft().set()


_alarms: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, _Alarm]] = WeakKeyDictionary()


def _alarm_of(loop: asyncio.AbstractEventLoop) -> _Alarm:
    """The loop's only alarm; called on the loop."""
    if (alarm := _alarms.get(loop)) is None:
        alarm = _alarms[loop] = _Alarm(loop)
    return alarm


class Attendance:
    """Watches client and clock while a request is under way; tells its inbox when the one leaves, the other is over.

    Args:
        receive: the request's own.
        patience_s: for so many seconds an answer is waited for; None: without end.
    """

    def __init__(self, receive: Receive, inbox: Inbox[T], patience_s: float | None) -> None:
        self._task = asyncio.create_task(_watch(receive, inbox))
        # one timer for all waits of a request: a time-out around each would be paid for every streamed token
        loop = asyncio.get_running_loop()
        self._timer = None if patience_s is None else loop.call_later(patience_s, inbox.expire)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Stop watching."""
        self._task.cancel()
        if self._timer is not None:
            self._timer.cancel()


async def _watch(receive: Receive, inbox: Inbox[T]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass  # the body is read already; anything else is none of our business
    inbox.abandon()
