"""Bodies on their way: for how long they are waited for, and what ends the waiting."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from exeunt.server.api import arrival
from exeunt.server.api.app import create_app
from exeunt.server.api.service import Availability

Counted = Callable[..., float]
BODY = b'{"prompt": "x", "max_new_tokens": 1}'


@contextlib.contextmanager
def half_sent(client: httpx.Client, path: str = "/generate", body: bytes = BODY) -> Iterator[socket.socket]:
    """A connection on which the first ten bytes of a body were sent."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=30) as sending:
        sending.sendall(head.encode() + body[:10])
        yield sending


def answer(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """The status and the error of an answer after which the server closes the connection."""
    received = b""
    while part := connection.recv(65536):
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    error: dict[str, Any] = json.loads(body)["error"]
    return int(head.split()[1]), error


def test_a_body_of_which_nothing_more_comes_is_a_408(
    client: httpx.Client, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival, "PAUSE_S", 0.2)
    with half_sent(client) as connection:
        status, error = answer(connection)
    assert (status, error["type"], error["code"]) == (408, "timeout_error", "body_timeout")
    assert error["message"] == (
        "Nothing of the body came for 0.2 s after its first 10 bytes; send the request again, without pauses."
    )
    assert counted("admission_rejections_total", reason="invalid") == 1


def test_a_body_that_takes_longer_than_its_request_may_is_a_408(
    client: httpx.Client, reopen: Callable[..., Any]
) -> None:
    reopen(request_timeout_s=0.2)
    with half_sent(client) as connection:
        status, error = answer(connection)
    assert (status, error["code"]) == (408, "body_timeout")
    assert error["message"] == (
        "The body was not complete within the 0.2 s that a request may take (--request-timeout): 10 bytes of it had "
        "come; send it faster."
    )


def test_a_body_that_goes_on_coming_is_waited_for(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival, "PAUSE_S", 1.0)
    with half_sent(client) as connection:
        for start in range(10, len(BODY), 6):  # five parts, which together take twice as long as a pause may
            time.sleep(0.4)
            connection.sendall(BODY[start : start + 6])
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("path", ["/generate", "/score"])
def test_the_time_of_a_request_begins_with_its_head(
    client: httpx.Client, reopen: Callable[..., Any], engine: Any, path: str
) -> None:
    availability: Availability = reopen()
    body = BODY if path == "/generate" else b'{"text": "xyz"}'
    with half_sent(client, path, body) as connection:
        while not availability.arriving:
            time.sleep(0.001)
        head_was_there = time.monotonic()
        connection.sendall(body[10:])
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    assert engine.requests[0].deadline - 60 < head_was_there
    if path == "/generate":
        assert engine.requests[0].deadline == engine.requests[0].arrival + 60


@dataclass
class Exchange:
    """One request to the application, without a server: the half of its body comes, the rest where `rest` is set."""

    app: FastAPI
    path: str = "/generate"
    rest: asyncio.Event = field(default_factory=asyncio.Event)
    sent: list[Any] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=lambda: [BODY[:10], BODY[10:]])

    def begin(self) -> asyncio.Task[None]:
        scope = {
            "type": "http",
            "method": "POST",
            "path": self.path,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        return asyncio.create_task(self.app(scope, self._receive, self._send))

    @property
    def status(self) -> int:
        status: int = self.sent[0]["status"]
        return status

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.sent[1]["body"])["error"]
        return error

    async def _receive(self) -> Any:
        if len(self.parts) < 2:
            await self.rest.wait()
        if not self.parts:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": self.parts.pop(0), "more_body": bool(self.parts)}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)


async def begun(exchange: Exchange) -> asyncio.Task[None]:
    """The request, when the half of its body has come."""
    task = exchange.begin()
    while len(exchange.parts) == 2:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task


def test_a_body_that_comes_for_nothing_is_not_waited_for(
    reopen: Callable[..., Any], counted: Counted
) -> None:
    availability: Availability = reopen()

    async def drain() -> Exchange:
        exchange = Exchange(create_app(availability, max_body_bytes=2000))
        task = await begun(exchange)
        availability.drains()
        await asyncio.wait_for(task, 30)
        return exchange

    exchange = asyncio.run(drain())
    assert (exchange.status, exchange.error["code"]) == (503, "draining")
    assert counted("admission_rejections_total", reason="unavailable") == 1
    assert not availability.arriving


def test_what_is_answered_while_draining_is_waited_for(reopen: Callable[..., Any]) -> None:
    availability: Availability = reopen()

    async def drain() -> Exchange:
        exchange = Exchange(create_app(availability, max_body_bytes=2000), "/tokenize")
        exchange.parts = [b'{"prompt"', b': "x"}']
        task = await begun(exchange)
        availability.drains()
        exchange.rest.set()
        await asyncio.wait_for(task, 30)
        return exchange

    assert asyncio.run(drain()).status == 200


@pytest.mark.parametrize("path", ["/generate", "/tokenize"])
def test_a_server_that_ends_tells_those_that_still_send(
    reopen: Callable[..., Any], counted: Counted, path: str
) -> None:
    availability: Availability = reopen()

    async def end() -> Exchange:
        exchange = Exchange(create_app(availability, max_body_bytes=2000), path)
        task = await begun(exchange)
        task.cancel()
        await asyncio.wait_for(task, 30)
        return exchange

    exchange = asyncio.run(end())
    assert (exchange.status, exchange.error["code"]) == (503, "draining")
    assert counted("request_failure_total", reason="shutdown") == 0
    assert counted("admission_rejections_total", reason="unavailable") == (path == "/generate")
