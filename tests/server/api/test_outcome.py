"""Every request to generate or score is counted once: answered, failed or not let in."""

import asyncio
import socket
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from exeunt.server.api.outcome import Outcome, OutcomeCount, outcome_of
from exeunt.server.engine import EngineStoppedError, QueueFullError, RequestTooLargeError
from exeunt.server.metrics import Metrics, new_registry
from exeunt.server.request import FailureEvent, FinishReason

Counted = Callable[..., float]


def counts(metrics: Metrics) -> dict[str, float]:
    """What was counted, by `kind reason`; zeros left out."""
    kinds = {
        "exeunt_request_success_total": "answered",
        "exeunt_request_failure_total": "failed",
        "exeunt_admission_rejections_total": "refused",
    }
    return {
        f"{kinds[sample.name]} {sample.labels.get('finish_reason', sample.labels.get('reason'))}": sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name in kinds and sample.value
    }


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(new_registry(), "tiny", ["0", "1"], ["block_0", "block_2"], [0.01])


class Asker:
    """Sends requests and remembers how many there were."""

    def __init__(self, client: httpx.Client, engine: Any) -> None:
        self.client, self.engine, self.sent = client, engine, 0

    def post(self, path: str = "/generate", **body: Any) -> httpx.Response:
        self.sent += 1
        default = {"prompt": "x", "max_new_tokens": 3} if path == "/generate" else {"text": "abc"}
        return self.client.post(path, json=default | body)

    def post_raw(self, content: bytes) -> httpx.Response:
        self.sent += 1
        return self.client.post("/generate", content=content, headers={"Content-Type": "application/json"})

    def refused_by_the_engine(self, error: Exception) -> None:
        self.engine.refuse = error
        self.post(), self.post("/score")
        self.engine.refuse = None

    def failed_by_the_engine(self, failure: FailureEvent) -> None:
        self.engine.failure = failure
        for fail_at, stream in ((0, False), (0, True), (1, False), (1, True)):
            self.engine.fail_at = fail_at
            self.post(stream=stream)
        self.post("/score")
        self.engine.fail_at = None

    def leave(self, **body: Any) -> None:
        self.sent += 1
        self.engine.before_gate = 1
        self.engine.gate.clear(), self.engine.gone.clear()
        leaving = httpx.Client(base_url=self.client.base_url, timeout=httpx.Timeout(5, read=0.2))
        with pytest.raises(httpx.ReadTimeout), leaving:
            leaving.post("/generate", json={"prompt": "x", "max_new_tokens": 3, **body})
        assert self.engine.gone.wait(5)
        self.engine.gate.set()


def test_what_was_counted_adds_up_to_what_was_sent(
    client: httpx.Client, engine: Any, reopen: Callable[..., Any], metrics: Metrics
) -> None:
    reopen(metrics=metrics)
    asker = Asker(client, engine)
    for body in ({}, {"n": 3}, {"stream": True}, {"n": 2, "stream": True}, {"details": False}):
        assert asker.post(**body).status_code == 200
    assert asker.post("/score").status_code == asker.post("/score", text="x").status_code == 200
    assert counts(metrics) == {"answered length": 5, "answered scored": 2}

    asker.post(prompt=""), asker.post("/score", text=""), asker.post(seed="x"), asker.post_raw(b"{")
    asker.post_raw(b'{"prompt": "' + b"x" * 3000 + b'"}')
    asker.refused_by_the_engine(QueueFullError(3))
    asker.refused_by_the_engine(EngineStoppedError("stopped"))
    asker.refused_by_the_engine(RequestTooLargeError(99, 32))
    refused = {
        "refused invalid": 6,
        "refused body_too_large": 1,
        "refused queue_full": 2,
        "refused unavailable": 2,
    }
    assert counts(metrics) == {"answered length": 5, "answered scored": 2, **refused}

    asker.failed_by_the_engine(FailureEvent("It broke.", "internal", "err-1"))
    asker.failed_by_the_engine(FailureEvent("Too late.", "timeout"))
    asker.failed_by_the_engine(FailureEvent("Bye.", "shutdown"))
    asker.leave()
    asker.leave(stream=True)
    engine.score = lambda request, on_done: on_done(object())  # a bug past admission
    assert asker.post("/score").status_code == 500
    engine.submit = lambda request, on_event: 1 / 0  # and one before
    assert asker.post().status_code == 500
    failed = {"failed internal": 7, "failed timeout": 5, "failed shutdown": 5, "answered cancelled": 2}
    assert counts(metrics) == {"answered length": 5, "answered scored": 2, **refused, **failed}
    assert sum(counts(metrics).values()) == asker.sent


@pytest.mark.parametrize("path", ["/generate", "/score"])
@pytest.mark.parametrize("sent", [b"", b'{"prompt": "x"'])
def test_a_client_that_leaves_while_it_sends_its_body_is_counted_as_that(
    client: httpx.Client, reopen: Callable[..., Any], metrics: Metrics, path: str, sent: bytes
) -> None:
    reopen(metrics=metrics)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as leaving:
        leaving.sendall(head.encode() + sent)
    deadline = time.monotonic() + 5
    while not counts(metrics) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert counts(metrics) == {"answered cancelled": 1}
    assert metrics.registry.get_sample_value("exeunt_client_disconnects_total", {"model_name": "tiny"}) == 1


def test_other_routes_and_methods_are_not_counted(
    client: httpx.Client, reopen: Callable[..., Any], metrics: Metrics
) -> None:
    reopen(metrics=metrics)
    assert client.get("/generate").status_code == 405
    assert client.post("/tokenize", json={}).status_code == 400
    assert client.post("/nowhere", json={}).status_code == 404
    assert counts(metrics) == {}


def test_a_missing_key_and_a_draining_server_refuse(
    serve: Callable[..., Any], client: httpx.Client, reopen: Callable[..., Any], metrics: Metrics
) -> None:
    reopen(metrics=metrics).drains()
    assert client.post("/generate", json={"prompt": "x"}).status_code == 503
    assert counts(metrics) == {"refused unavailable": 1}
    with serve(api_key="secret") as locked:
        assert locked.post("/score", json={"text": "x"}).status_code == 401
        assert 'admission_rejections_total{model_name="tiny",reason="unauthorized"} 1.0' in (
            locked.get("/metrics").text
        )


class TestOutcome:
    def test_only_the_first_word_counts(self, metrics: Metrics) -> None:
        outcome = Outcome(metrics)
        outcome.succeeded(FinishReason.STOP)
        outcome.failed("internal")
        outcome.client_left()
        outcome.rejected("invalid")
        assert counts(metrics) == {"answered stop": 1}

    def test_a_request_that_is_not_counted_has_one_all_the_same(self) -> None:
        outcome_of({"type": "http"}).failed("internal")

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (None, "failed internal"),
            (RuntimeError("a bug"), "failed internal"),
            (asyncio.CancelledError(), "failed shutdown"),
        ],
    )
    def test_none_ends_uncounted(
        self, metrics: Metrics, error: BaseException | None, expected: str, reopen: Callable[..., Any]
    ) -> None:
        availability = reopen(metrics=metrics)

        app = SimpleNamespace(state=SimpleNamespace(availability=availability))

        async def silent(scope: Any, receive: Any, send: Any) -> None:
            if error is not None:
                raise error

        scope = {"type": "http", "method": "POST", "path": "/score", "app": app}
        running = OutcomeCount(silent)(scope, None, None)  # type: ignore[arg-type]
        if error is None:
            asyncio.run(running)
        else:
            with pytest.raises(type(error)):
                asyncio.run(running)
        assert counts(metrics) == {expected: 1}
