"""Connections of `exeunt serve` on which no request comes: how long they may stay, and how many there may be."""

import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest
import uvicorn
import uvloop

from exeunt.deploy import http_connection
from exeunt.deploy.http_connection import Connection, most_connections
from exeunt.server.api.app import create_app
from exeunt.server.api.service import Availability
from tests.deploy.server_process import eventually

HALF_A_HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Half: "
HALF_A_BODY = (
    b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
)
WHOLE = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@contextmanager
def listening() -> Iterator[tuple[str, int]]:
    """A server without a model; its address."""
    app = create_app(Availability(), max_body_bytes=2000)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        config = uvicorn.Config(
            app, log_config=None, lifespan="off", http=Connection, ws="none", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: uvloop.run(server.serve([sock])), daemon=True)
        thread.start()
        eventually(lambda: server.started, "listening")
        yield sock.getsockname()
        server.should_exit = True
        thread.join(10)


def ended(connection: socket.socket) -> bool:
    """Whether the server closes a connection without an answer; waits for it to do so."""
    try:
        return connection.recv(65536) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("sent", [[], [HALF_A_HEAD], [HALF_A_HEAD, b"a", b"a"], [WHOLE, HALF_A_HEAD]])
def test_a_head_that_does_not_come_is_not_waited_for(
    sent: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_connection, "KEEP_ALIVE_S", 0.3)
    with listening() as address, socket.create_connection(address, timeout=30) as connection:
        for part in sent:
            connection.sendall(part)
            answer = b""
            while part is WHOLE and b"}" not in answer:
                answer += connection.recv(65536)
        assert ended(connection)


def test_a_request_that_is_there_may_take_longer_than_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "KEEP_ALIVE_S", 0.3)
    with listening() as address, socket.create_connection(address, timeout=30) as connection:
        connection.sendall(HALF_A_BODY)
        with socket.create_connection(address, timeout=30) as other:  # one that is closed in the meantime
            assert ended(other)
        connection.sendall(b" " * 98 + b"}")
        assert connection.recv(65536).startswith(b"HTTP/1.1 503"), "no model is loaded"


@pytest.mark.parametrize("sent", [b"", HALF_A_HEAD, HALF_A_BODY])
def test_unfinished_requests_make_room_for_others(
    sent: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_connection, "most_connections", lambda: 3)
    monkeypatch.setattr(Connection, "_said", None)
    with listening() as address, ExitStack() as opened:

        def connect() -> socket.socket:
            return opened.enter_context(socket.create_connection(address, timeout=30))

        connections = []
        for _ in range(5):
            connections.append(connect())
            connections[-1].sendall(sent)
        assert [ended(connection) for connection in connections[:2]] == [True, True], "the oldest"
        assert httpx.get(f"http://{address[0]}:{address[1]}/health").status_code == 200
    warnings = [record for record in caplog.records if record.name == "exeunt.serve"]
    assert len(warnings) == 1, "it is said once, not for every connection"
    assert "3 connections are open" in warnings[0].getMessage()


def test_the_limit_leaves_descriptors_for_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    code = (
        "import resource; from exeunt.deploy.http_connection import most_connections;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); print(most_connections())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "192"
    assert most_connections() > 0
    assert (soft, hard) == resource.getrlimit(resource.RLIMIT_NOFILE)


def test_another_protocol_that_is_asked_for_is_no_matter_for_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with listening() as address:
        headers = {"Connection": "Upgrade", "Upgrade": "websocket"}
        answer = httpx.get(f"http://{address[0]}:{address[1]}/health", headers=headers)
    assert answer.status_code == 200
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
