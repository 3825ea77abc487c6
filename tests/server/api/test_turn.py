"""What is long waits for its turn no longer than its request may take, and no longer than its client does."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import Request

from exeunt.server.api import json_route
from exeunt.server.api.errors import ApiError
from exeunt.server.api.service import Availability, Service
from exeunt.server.api.tokenizer import INLINE_CHARACTERS, INLINE_TOKENS, LONG_CHARACTERS, SharedTokenizer
from exeunt.server.api.turn import in_turn
from exeunt.server.engine_config import EngineConfig
from tests.server.api.conftest import ScriptedEngine, listening, make_service
from tests.server.api.test_tokenizer import FrailTokenizer

MANY_BYTES = 1 << 20
Serving = tuple[Service, httpx.Client]
Serve = Callable[[FrailTokenizer], Serving]
ROUTES = {
    "/generate": {"prompt": "x" * (INLINE_CHARACTERS + 1), "max_new_tokens": 1},
    "/score": {"text": "x" * (INLINE_CHARACTERS + 1)},
    "/tokenize": {"prompt": "x" * LONG_CHARACTERS},
    "/detokenize": {"tokens": [1] * (INLINE_CHARACTERS + 1)},
}


class SlowToName(FrailTokenizer):
    """Cuts at once what is long too, and comes to no end naming it."""

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        return [*text.encode()]


@pytest.fixture
def serve_with(engine: ScriptedEngine) -> Iterator[Serve]:
    """A server whose requests may take 0.3 s, with a tokenizer that ends no long work before the test's own end."""
    availability, used = Availability(), list[FrailTokenizer]()
    with listening(availability, max_body_bytes=MANY_BYTES) as client:

        def served(frail: FrailTokenizer) -> Serving:
            config = EngineConfig(max_model_len=10 * LONG_CHARACTERS)
            service = make_service(engine, request_timeout_s=0.3, config=config, max_body_bytes=MANY_BYTES)
            object.__setattr__(service, "tokenizer", SharedTokenizer(frail))
            availability.opens(service)
            used.append(frail)
            return service, client

        yield served
        for frail in used:
            frail.loop_went_on.set()


def failures(service: Service) -> float | None:
    labels = {"model_name": "tiny", "reason": "timeout"}
    return service.metrics.registry.get_sample_value("exeunt_request_failure_total", labels)


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_over_time_at_the_tokenizer_is_told_so(route: str, serve_with: Serve) -> None:
    stuck = FrailTokenizer()
    service, client = serve_with(stuck)
    answer = client.post(route, json=ROUTES[route])
    assert answer.status_code == 504
    assert answer.json()["error"] == {
        "message": "The request timed out at the tokenizer, after the 0.3 s that it may take; "
        "send less at once, try again later or raise --request-timeout.",
        "type": "timeout_error",
        "param": None,
        "code": "timeout",
    }
    assert stuck.at_work.wait(30)
    assert failures(service) == float(route in ("/generate", "/score"))
    assert client.get("/health").status_code == 200


def test_what_waits_behind_it_is_not_cut_any_more(serve_with: Serve) -> None:
    stuck = FrailTokenizer()
    _, client = serve_with(stuck)
    first = threading.Thread(target=lambda: client.post("/tokenize", json=ROUTES["/tokenize"]))
    first.start()
    assert stuck.at_work.wait(30)
    assert client.post("/tokenize", json={"prompt": "z" * LONG_CHARACTERS}).status_code == 504
    first.join(30)
    stuck.loop_went_on.set()
    assert client.post("/tokenize", json={"prompt": "y" * LONG_CHARACTERS}).status_code == 200
    assert [text[0] for text in stuck.encoded] == ["x", "y"]


def test_names_are_waited_for_no_longer_either(serve_with: Serve) -> None:
    slow = SlowToName()
    _, client = serve_with(slow)
    assert client.post("/tokenize", json={"prompt": "x" * 4 * INLINE_TOKENS}).status_code == 504
    assert slow.at_work.is_set()


def test_a_large_body_is_waited_for_no_longer_either(
    serve_with: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()

    def slow(*_: object) -> None:
        goes_on.wait(30)

    service, client = serve_with(FrailTokenizer())
    monkeypatch.setattr(json_route, "read_body", slow)
    answer = client.post("/score", json={"text": "x" * json_route.INLINE_BYTES})
    goes_on.set()
    assert answer.status_code == 504
    assert answer.json()["error"]["message"].startswith(
        "The request timed out before its body was read, after"
    )
    assert failures(service) == 1


def test_time_spent_before_its_turn_is_the_requests_too() -> None:
    """As on a body that came slowly: its time began with its head."""

    async def nothing_comes() -> Any:
        await asyncio.Event().wait()

    async def asked(came: float) -> str:
        scope = {"type": "http", "exeunt.arrival": came}
        service: Any = SimpleNamespace(request_timeout_s=20.0)
        return await in_turn(Request(scope, nothing_comes), service, asyncio.sleep(0.01, "cut"), brief=False)

    now = time.monotonic()
    assert asyncio.run(asked(now)) == "cut"
    with pytest.raises(ApiError, match="timed out at the tokenizer, after the 20 s"):
        asyncio.run(asked(now - 20.0))
