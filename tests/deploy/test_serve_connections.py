"""Connections of `exeunt serve` on which no request comes: how long they may stay, and how many there may be."""

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
from exeunt.deploy.http_connection import Connection
from exeunt.server.api.app import create_app
from exeunt.server.api.service import Availability
from tests.deploy.server_process import eventually

HALF_A_HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Half: "
HALF_A_BODY = (
    b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
)
WHOLE = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
LONG_ANSWER = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"


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


def test_a_head_that_comes_byte_by_byte_has_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "KEEP_ALIVE_S", 0.6)
    with listening() as address, socket.create_connection(address, timeout=30) as connection:
        connection.sendall(HALF_A_HEAD)
        connection.settimeout(0.1)
        for _ in range(200):  # 20 s, if each byte were waited for anew
            try:
                if connection.recv(1) == b"":
                    break
            except TimeoutError:
                connection.sendall(b"a")
            except ConnectionResetError:
                break
        else:
            raise AssertionError("the connection is still open")


def test_a_body_that_goes_on_behind_its_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "KEEP_ALIVE_S", 0.3)
    with listening() as address, socket.create_connection(address, timeout=30) as connection:
        connection.sendall(HALF_A_BODY.replace(b"/generate", b"/nowhere"))
        assert connection.recv(65536).startswith(b"HTTP/1.1 404")
        connection.sendall(b"a")
        assert ended(connection)


def test_a_client_that_reads_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "KEEP_ALIVE_S", 0.5)
    monkeypatch.setattr(http_connection, "most_connections", lambda: 2)
    with listening() as address, ExitStack() as opened:
        for _ in range(2):
            reader = opened.enter_context(socket.create_connection(address, timeout=30))
            reader.sendall(LONG_ANSWER * 300)

        def answered() -> bool:
            try:
                return httpx.get(f"http://{address[0]}:{address[1]}/health").status_code == 200
            except httpx.TransportError:
                return False

        eventually(answered, "room for another")


def test_an_answer_that_is_still_sent_makes_room_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "most_connections", lambda: 2)
    sending: set[int] = set()  # the clients' ports
    monkeypatch.setattr(Connection, "_has_unsent", property(lambda one: one.client[1] in sending))
    with listening() as address, ExitStack() as opened:

        def connect() -> socket.socket:
            return opened.enter_context(socket.create_connection(address, timeout=30))

        older, newer = connect(), connect()
        sending.add(older.getsockname()[1])
        connect()
        assert ended(newer)
        older.sendall(WHOLE)
        assert older.recv(65536).startswith(b"HTTP/1.1 200")


def test_an_answer_is_followed_by_no_refusal(caplog: pytest.LogCaptureFixture) -> None:
    chunked = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with listening() as address, socket.create_connection(address, timeout=30) as connection:
        connection.sendall(chunked)
        assert connection.recv(65536).startswith(b"HTTP/1.1 404")
        connection.sendall(b"ZZZ\r\n")
        assert ended(connection)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_where_all_wait_for_answers_the_new_one_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "most_connections", lambda: 2)
    monkeypatch.setattr(Connection, "_is_unfinished", property(lambda connection: False))
    with listening() as address, ExitStack() as opened:
        first, second, third = (
            opened.enter_context(socket.create_connection(address, timeout=30)) for _ in range(3)
        )
        assert ended(third)
        for connection in (first, second):
            connection.sendall(WHOLE)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_who_was_answered_lately_makes_room_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "most_connections", lambda: 2)
    with listening() as address, ExitStack() as opened:

        def connect() -> socket.socket:
            return opened.enter_context(socket.create_connection(address, timeout=30))

        older, newer = connect(), connect()
        for connection in (newer, older):  # the older one is used last
            connection.sendall(WHOLE)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connect()
        assert ended(newer)
        older.sendall(WHOLE)
        assert older.recv(65536).startswith(b"HTTP/1.1 200")


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
    code = (
        "import resource; from exeunt.deploy.http_connection import most_connections;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); print(most_connections())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "192"


def test_another_protocol_that_is_asked_for_is_no_matter_for_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with listening() as address:
        headers = {"Connection": "Upgrade", "Upgrade": "websocket"}
        answer = httpx.get(f"http://{address[0]}:{address[1]}/health", headers=headers)
    assert answer.status_code == 200
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
