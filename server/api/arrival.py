"""When a request came, and how long its body is waited for."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Final

from starlette.requests import ClientDisconnect
from starlette.types import Scope

from exeunt.server.api.errors import ApiError, client_left, draining
from exeunt.server.api.service import Availability

PAUSE_S: Final = 60.0  # for which nothing may come; the whole body has as long as its request
_KEY: Final = "exeunt.arrival"


def note_arrival(scope: Scope) -> None:
    """A request's head is there: its time begins."""
    scope[_KEY] = time.monotonic()


def arrival_of(scope: Scope) -> float:
    """When a request's head was there, on the `time.monotonic` clock, seconds."""
    arrival: float = scope[_KEY]
    return arrival


class BodyArrival:
    """One body on its way.

    Args:
        scope: its request, whose arrival is noted.
        availability: what the server is doing.
        drained: whether the server refuses such requests while it drains, for which their bodies are not waited for.
    """

    def __init__(self, scope: Scope, availability: Availability, *, drained: bool) -> None:
        self._scope, self._availability, self._drained = scope, availability, drained
        self._received = 0
        self._ends_with_request = False  # the request's time is over before a pause is too long

    async def whole(self, stream: AsyncIterator[bytes]) -> bytes:
        """The body; raises ApiError 408 where it does not come in time, 503 where it comes for nothing."""
        try:
            return await self._gathered(stream)
        except TimeoutError:
            raise (draining() if self._is_for_nothing else self._late()) from None
        except ClientDisconnect as error:
            raise client_left(self._scope) from error

    async def _gathered(self, stream: AsyncIterator[bytes]) -> bytes:
        parts = []
        async with asyncio.timeout(self._patience_s()) as timeout:
            if self._drained:
                self._availability.arriving.add(timeout)
            try:
                async for part in stream:
                    parts.append(part)
                    self._received += len(part)
                    timeout.reschedule(asyncio.get_running_loop().time() + self._patience_s())
            finally:
                self._availability.arriving.discard(timeout)
        return b"".join(parts)

    @property
    def _is_for_nothing(self) -> bool:
        return self._drained and self._availability.phase == "draining"

    @property
    def _time_s(self) -> float | None:
        """What a request may take, seconds; None while the model loads, when none is served."""
        service = self._availability.service
        return None if service is None else service.request_timeout_s

    def _patience_s(self) -> float:
        """For how long the next part is waited for, seconds."""
        if self._is_for_nothing:
            return 0.0
        if self._time_s is None:
            return PAUSE_S
        left = max(0.0, arrival_of(self._scope) + self._time_s - time.monotonic())
        self._ends_with_request = left < PAUSE_S
        return min(PAUSE_S, left)

    def _late(self) -> ApiError:
        if self._ends_with_request:
            message = (
                f"The body was not complete within the {self._time_s:g} s that a request may take "
                f"(--request-timeout): {self._received} bytes of it had come; send it faster."
            )
        else:
            message = (
                f"Nothing of the body came for {PAUSE_S:g} s after its first {self._received} bytes; "
                "send the request again, without pauses."
            )
        return ApiError(408, message, code="body_timeout", headers={"Connection": "close"})
