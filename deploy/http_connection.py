"""A client's connection: how long a request's head is waited for on it, and how many there may be."""

import asyncio
import itertools
import logging
import resource
import time
from collections.abc import Iterator
from typing import Any, ClassVar, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger("exeunt.serve")

KEEP_ALIVE_S: Final = 75  # longer than the idle time-outs of common proxies, which must not race with ours
_FILES: Final = 64
"""Descriptors beside connections: the listening socket, the event loop's own, files that are read."""
_SAY_AGAIN_S: Final = 60.0
_UNFINISHED: Final = (h11.IDLE, h11.SEND_BODY)  # the client's state while it has more of a request to send


def most_connections() -> int:
    """Connections that the process's limit of descriptors leaves room for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, soft - _FILES) if soft != resource.RLIM_INFINITY else 1 << 20


class Connection(H11Protocol):
    """uvicorn's, which waits for a request's head without end and accepts until descriptors run out.

    Where there are as many as may be, the one that has gone longest without a complete request makes room, one whose
    answer is still being sent last; where all wait for answers, the new one is closed. A client that reads nothing of
    its answer is waited for as long as one that sends nothing.
    """

    _turns: ClassVar[Iterator[int]] = itertools.count()  # in which order connections began to wait
    _said: ClassVar[float | None] = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._head_due: asyncio.TimerHandle | None = None
        self._read_due: asyncio.TimerHandle | None = None
        self._turn = next(self._turns)
        self._wait_for_head()
        if len(self.connections) > most_connections():
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Take in what came; a head that is complete is not waited for any more, one that has begun is."""
        super().data_received(data)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing."""
        super().connection_lost(exc)
        self._stop_waiting()
        self._is_read()

    def on_response_complete(self) -> None:
        """Begin anew, or end once the client has read what is left."""
        self._turn = next(self._turns)
        super().on_response_complete()
        if self.transport.is_closing():
            self._wait_for_reader()

    def pause_writing(self) -> None:
        """Wait for a client that does not read, for so long and no longer."""
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        """Go on: it reads."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._is_read()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or end where an answer has been given already and no other may follow."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def _wait_for_reader(self) -> None:
        if self._read_due is None:
            self._read_due = self.loop.call_later(KEEP_ALIVE_S, self.transport.abort)

    def _is_read(self) -> None:
        if self._read_due is not None:
            self._read_due.cancel()
            self._read_due = None

    def _wait_for_head(self) -> None:
        states = self.conn.their_state, self.conn.our_state
        # a body that goes on behind its answer is as good as a head that does not come: nothing is done for it
        if states[0] is not h11.IDLE and states != (h11.SEND_BODY, h11.DONE):
            self._stop_waiting()
        elif self._head_due is None:
            self._head_due = self.loop.call_later(KEEP_ALIVE_S, self.timeout_keep_alive_handler)

    def _stop_waiting(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    @property
    def _is_unfinished(self) -> bool:
        return self.conn.their_state in _UNFINISHED

    @property
    def _has_unsent(self) -> bool:
        return bool(self.transport.get_write_buffer_size())

    def _make_room(self) -> None:
        others: list[Any] = [other for other in self.connections if other is not self]
        unfinished = [other for other in others if isinstance(other, Connection) and other._is_unfinished]
        closed = min(unfinished, key=lambda other: (other._has_unsent, other._turn), default=self)
        self.connections.discard(closed)
        closed.transport.abort()
        self._say_once(len(others))

    @classmethod
    def _say_once(cls, connections: int) -> None:
        now = time.monotonic()
        if cls._said is None or now - cls._said > _SAY_AGAIN_S:
            cls._said = now
            logger.warning(
                "%d connections are open, as many as the limit of descriptors leaves room for: those without a "
                "complete request are closed for new ones; raise the limit (ulimit -n), or look who holds them.",
                connections,
            )

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: a client may ask for another protocol, and gets an answer in this one."""
