"""What a request may not say, and how it is told: over real HTTP, in one shape, with value, limit and remedy."""

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest

from exeunt.compression.variant import Variant
from exeunt.server.api.body import BodyLimit
from exeunt.server.api.errors import ApiError
from exeunt.server.api.offer import Offer
from exeunt.server.engine import RequestTooLargeError
from exeunt.server.request import FailureEvent
from tests.server.api.conftest import FULL, INT4, error_of

JSON = {"Content-Type": "application/json"}
Serve = Callable[..., AbstractContextManager[httpx.Client]]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"promt": "x"}, "promt", ["Unknown field promt (did you mean prompt?); known are compression,"]),
        ({"prompt": "x", "promt": 1}, "promt", ["Unknown field promt; known", "max_new_tokens"]),
        ({"prompt": "x", "presence_penalty": 1}, "presence_penalty", ["field presence_penalty; known"]),
        ({"prompt": "x", "compression": {"wieghts": "int4"}}, "compression.wieghts", ["weights", "kv_cache"]),
        (
            {"prompt": "x", "compression": {"early_exit": {"mod": "off"}}},
            "compression.early_exit.mod",
            ["Unknown field compression.early_exit.mod (did you mean mode?)", "max_disagreement"],
        ),
        ({"Prompt": "x"}, "Prompt", ["Unknown field Prompt (did you mean prompt?); known are compression,"]),
        ({"prompt": "x", "a[0]": 1}, '"a[0]"', ['Unknown field "a[0]"; known']),
        ({"prompt": "x", "": 1}, '""', ['Unknown field ""; known']),
        ({"prompt": "x", "a b.": 1}, '"a b."', ['Unknown field "a b."; known']),
        (
            {"prompt": "x", "compression": {"Weights": "int4"}},
            "compression.Weights",
            ["Unknown field compression.Weights (did you mean weights?); known are early_exit,"],
        ),
        ({"prompt": "x", "compression": {"": 1}}, 'compression.""', ['Unknown field compression.""; known']),
        ({}, "prompt", ["prompt", "prompt_token_ids"]),
        ({"prompt": "x", "prompt_token_ids": [1]}, "prompt", ["Both", "one of them"]),
        ({"prompt": ""}, "prompt", ['""', "not be empty"]),
        ({"prompt_token_ids": []}, "prompt_token_ids", ["[]", "not be empty"]),
        ({"prompt": "beyond"}, "prompt", ["token 300", "vocabulary of 300"]),
        ({"prompt": 5}, "prompt", ["prompt is 5; it must be a string."]),
        (
            {"prompt": "x", "max_tokens": 5},
            "max_tokens",
            ["max_tokens (did you mean max_new_tokens?); known"],
        ),
        ({"prompt": "x", "x" * 99: 5}, f'"{"x" * 59}…', [f'Unknown field "{"x" * 59}…; known']),
        ({"prompt_token_ids": [1, 300]}, "prompt_token_ids[1]", ["300", "0 to 299"]),
        ({"prompt_token_ids": [1, -1]}, "prompt_token_ids[1]", ["-1", "0"]),
        ({"prompt_token_ids": [1, 10**30]}, "prompt_token_ids[1]", ["299"]),
        ({"prompt_token_ids": [1, True]}, "prompt_token_ids[1]", ["true", "integer"]),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids", ['is "abc"; it must be a list.']),
        ({"prompt": "x", "stop": "."}, "stop", ['stop is "."; it must be a list of strings such as ["."]']),
        ({"prompt": "x", "stop": [5]}, "stop[0]", ["5", "string"]),
        ({"prompt": "x", "stop": 5}, "stop", ["5", "list"]),
        ({"prompt": "x", "stream": "yes"}, "stream", ['"yes"; it must be true or false']),
        (
            {"prompt": "x", "compression": {"linear_block": "yes"}},
            "compression.linear_block",
            ['compression.linear_block is "yes"; it must be true or false'],
        ),
        ({"prompt": "x", "max_new_tokens": "3"}, "max_new_tokens", ['is "3"; it must be an integer.']),
        ({"prompt": "x", "max_new_tokens": 3.0}, "max_new_tokens", ["is 3.0; it must be an integer."]),
        ({"prompt": "x", "max_new_tokens": True}, "max_new_tokens", ["true", "integer"]),
        ({"prompt": "x", "max_new_tokens": None}, "max_new_tokens", ["null", "integer"]),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens", ["0", "at least 1"]),
        ({"prompt": "x", "max_new_tokens": -5}, "max_new_tokens", ["-5"]),
        ({"prompt": "x", "max_new_tokens": 99}, "max_new_tokens", ["2 tokens", "99", "100", "at most 98"]),
        ({"prompt": "x" * 200}, "prompt", ["201 tokens", "100"]),
        ({"prompt_token_ids": [1] * 200}, "prompt_token_ids", ["200 tokens", "100"]),
        ({"prompt": "x", "min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens", ["9", "8"]),
        ({"prompt": "x", "temperature": -0.1}, "temperature", ["-0.1", "0"]),
        ({"prompt": "x", "temperature": 1e-9}, "temperature", ["1e-09", "0.01"]),
        ({"prompt": "x", "temperature": "hot"}, "temperature", ['is "hot"; it must be a number.']),
        ({"prompt": "x", "temperature": True}, "temperature", ["true", "number"]),
        ({"prompt": "x", "top_p": 0}, "top_p", ["0", "above 0"]),
        ({"prompt": "x", "top_p": 1.5}, "top_p", ["1.5", "1"]),
        ({"prompt": "x", "top_k": -1}, "top_k", ["-1", "0"]),
        ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty", ["0", "0.01"]),
        ({"prompt": "x", "seed": -1}, "seed", ["-1", "0"]),
        ({"prompt": "x", "seed": 2**63}, "seed", ["9223372036854775808", "9223372036854775807"]),
        ({"prompt": "x", "stop": "x"}, "stop", ["list"]),
        ({"prompt": "x", "stop": [""]}, "stop[0]", ["not be empty"]),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop", ["at most 16"]),
        ({"prompt": "x", "stop": ["a" * 257]}, "stop[0]", ["at most 256"]),
        ({"prompt": "x", "n": 0}, "n", ["0", "1"]),
        ({"prompt": "x", "n": 17}, "n", ["17", "16"]),
        ({"prompt": "x", "n": 9}, "n", ["9", "at most 8"]),
        ({"prompt": "x", "stream": "yes"}, "stream", ["yes", "true or false"]),
        ({"prompt": "x", "details": 1}, "details", ["1", "true or false"]),
        (
            {"prompt": "x", "compression": {"weights": "int8"}},
            "compression.weights",
            ["int8", "'int4' or 'full'"],
        ),
        (
            {"prompt": "x", "compression": {"linear_block": 1}},
            "compression.linear_block",
            ["1", "true or false"],
        ),
        (
            {"prompt": "x", "compression": {"linear_block": True}},
            "compression.linear_block",
            ["no linear block"],
        ),
        (
            {"prompt": "x", "compression": {"early_exit": "on"}},
            "compression.early_exit",
            ["on", "true", "object"],
        ),
        (
            {"prompt": "x", "compression": {"early_exit": {"mode": "verified", "skipped_kv": "propagate"}}},
            "compression.early_exit.skipped_kv",
            ["'verified'", "'approximate'"],
        ),
        (
            {"prompt": "x", "compression": {"early_exit": {"mode": "approximate", "threshold": 1.5}}},
            "compression.early_exit.threshold",
            ["1.5", "1"],
        ),
        (
            {"prompt": "x", "compression": {"early_exit": {"mode": "approximate", "max_disagreement": 0.3}}},
            "compression.early_exit.max_disagreement",
            ["0.3", "0.05, 0.1"],
        ),
        ({"prompt": "x", "compression": []}, "compression", ["[]", "object"]),
    ],
)
def test_a_body_that_cannot_be_served(client: httpx.Client, body: Any, param: str, words: list[str]) -> None:
    response = client.post("/generate", json=body)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    for word in words:
        assert word in error["message"], error["message"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "malformed_json"),
        (b"", "missing_body"),
        (b"[]", "invalid_value"),
        (b"null", "invalid_value"),
        (b'"text"', "invalid_value"),
        (b"\xff\xfe", "malformed_json"),
        (b'{"prompt": "\xff"}', "malformed_json"),
        (b'{"prompt": "\\ud800"}', "malformed_json"),
        (b'{"prompt": "x", "max_new_tokens": ' + b"9" * 1500 + b"}", "too_long"),
        (b"[" * 1900, "malformed_json"),
        (b'{"prompt": "x", "temperature": NaN}', "invalid_value"),
        (b'{"prompt": "x", "temperature": Infinity}', "invalid_value"),
        (b'{"prompt": "x", "temperature": -Infinity}', "invalid_value"),
        (b'{"prompt": "x", "temperature": 1e999}', "invalid_value"),
        (b'{"prompt": "x", "max_new_tokens": NaN}', "invalid_value"),
        (b'{"prompt": "x", "compression": {"early_exit": {"threshold": NaN}}}', "invalid_value"),
    ],
)
def test_a_body_that_is_no_proper_json(client: httpx.Client, content: bytes, code: str) -> None:
    response = client.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert error_of(response)["code"] == code
    assert len(error_of(response)["message"]) < 2000


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (b'{"prompt": "x", "prompt": "y"}', "prompt"),
        (b'{"prompt": "x", "pr\\u006fmpt": "x"}', "prompt"),
        (b'{"prompt": "x", "compression": {"kv_cache": "int4", "kv_cache": "full"}}', "kv_cache"),
        (b'{"prompt": "x", "stop": [{"a": 1, "b": {}, "a": 1}]}', "a"),
    ],
)
def test_a_key_that_is_given_twice_is_named(client: httpx.Client, content: bytes, key: str) -> None:
    response = client.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["code"] == "malformed_json"
    assert f'the key "{key}" is given twice' in error["message"]


def test_keys_may_be_alike_in_objects_apart(client: httpx.Client) -> None:
    content = b'{"prompt": "x", "max_new_tokens": 2, "compression": {"early_exit": {"mode": "off"}, "weights": null}}'
    same = b'[{"a": 1}, {"a": 1}, {"b": {"a": 1}, "a": 1}]'
    assert client.post("/generate", content=content, headers=JSON).status_code == 200
    response = client.post("/generate", content=same, headers=JSON)
    assert error_of(response)["code"] == "invalid_value", "it is JSON, and no object"


@pytest.mark.parametrize(
    ("body", "field"), [({"text": "x" * 200}, "text"), ({"token_ids": [1] * 200}, "token_ids")]
)
def test_a_text_that_is_too_long_is_blamed_on_the_field_it_came_in(
    client: httpx.Client, engine: Any, body: dict[str, Any], field: str
) -> None:
    error = error_of(client.post("/score", json=body))
    assert (error["code"], error["param"]) == ("too_long", field)
    engine.refuse = RequestTooLargeError(99, 32)
    error = error_of(client.post("/score", json={name: value[:3] for name, value in body.items()}))
    assert (error["code"], error["param"]) == ("too_long", field)


@pytest.mark.parametrize("path", ["/generate", "/score"])
@pytest.mark.parametrize(
    ("offered", "holds", "said"),
    [
        ((FULL, Variant(kv_cache="int4")), 61, True),
        ((FULL, Variant(kv_cache="int4")), 60, False),
        ((FULL, INT4), 61, False),  # not with these weights
    ],
)
def test_what_another_format_of_the_kv_cache_would_hold_is_said(
    client: httpx.Client,
    reopen: Callable[..., Any],
    engine: Any,
    path: str,
    offered: tuple[Variant, ...],
    holds: int,
    said: bool,
) -> None:
    reopen(offer=Offer(offered, FULL))
    engine.refuse, engine.held = RequestTooLargeError(61, 32), {"int4": holds, "full": 32}
    prompt = {"prompt": "x", "max_new_tokens": 60} if path == "/generate" else {"text": "x"}
    message = error_of(client.post(path, json=prompt))["message"]
    assert message.startswith(
        "The request takes room for 61 tokens and the KV cache holds 32 in its format; "
    )
    assert message.endswith(", or ask for kv_cache int4, in which it holds 61.") == said


def test_a_timeout_names_the_time_that_was_over(client: httpx.Client, engine: Any) -> None:
    engine.fail_at, engine.failure = 0, FailureEvent("Too late.", "timeout")
    for path, body in (("/generate", {"prompt": "x"}), ("/score", {"text": "x"})):
        response = client.post(path, json=body)
        assert response.status_code == 504
        assert "after the 60 s that it may take; " in error_of(response)["message"]
        assert "--request-timeout" in error_of(response)["message"]


def test_one_is_not_called_many(client: httpx.Client, reopen: Callable[..., Any]) -> None:
    def message(**body: Any) -> str:
        said: str = error_of(client.post("/generate", json=body))["message"]
        return said

    assert "has 1 token and max_new_tokens is 100" in message(prompt_token_ids=[1], max_new_tokens=100)
    assert message(prompt_token_ids=[1] * 99, max_new_tokens=2).endswith("ask for at most 1 new token.")


def test_refusals_are_counted_by_reason(client: httpx.Client, counted: Callable[..., float]) -> None:
    client.post("/generate", json={"prompt": ""})
    client.post("/generate", content=b"x" * 3000)
    client.post("/tokenize", json={})
    assert counted("admission_rejections_total", reason="invalid") == 1
    assert counted("admission_rejections_total", reason="body_too_large") == 1


def test_no_refused_request_reaches_the_engine(client: httpx.Client, engine: Any) -> None:
    client.post("/generate", json={"prompt": "x", "n": 99})
    assert engine.requests == []


def test_a_body_over_the_limit_is_a_413(client: httpx.Client) -> None:
    response = client.post("/generate", content=b"x" * 2001, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert "2001 bytes" in error_of(response)["message"]
    assert "2000" in error_of(response)["message"]


def test_a_body_over_the_limit_in_pieces_is_a_413(client: httpx.Client) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(5):
            yield b"x" * 500

    response = client.post("/generate", content=pieces(), headers={"Content-Type": "application/json"})
    assert "content-length" not in response.request.headers
    assert response.status_code == 413
    assert "2000" in error_of(response)["message"]


def test_of_a_complete_body_over_the_limit_nothing_more_is_waited_for() -> None:
    pieces = [
        {"type": "http.request", "body": b"x" * 6, "more_body": True},
        {"type": "http.request", "body": b"x" * 6, "more_body": False},
    ]

    async def receive() -> Any:
        assert pieces, "more of a complete body was waited for"
        return pieces.pop(0)

    async def reads(_: Any, receive: Any, __: Any) -> None:
        while True:
            await receive()

    async def refused() -> None:
        scope = {"type": "http", "headers": []}
        with pytest.raises(ApiError, match="more than 10 bytes"):
            await BodyLimit(reads, max_bytes=10)(scope, receive, None)  # type: ignore[arg-type]

    asyncio.run(refused())


def test_a_body_at_the_limit_is_read(client: httpx.Client) -> None:
    body = json.dumps({"prompt": "x", "max_new_tokens": 1}).encode()
    padded = body + b" " * (2000 - len(body))
    response = client.post("/generate", content=padded, headers={"Content-Type": "application/json"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("POST", "/v1/completions", 404, "not_found"),
        ("POST", "/v1/chat/completions", 404, "not_found"),
        ("POST", "/generate/", 404, "not_found"),
        ("GET", "/generate", 405, "method_not_allowed"),
        ("POST", "/info", 405, "method_not_allowed"),
    ],
)
def test_routes_that_are_not_there(
    client: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert path in error_of(response)["message"]
    assert ("POST /generate continues a prompt" in error_of(response)["message"]) == ("completions" in path)


@pytest.mark.parametrize(
    "ask",
    [
        lambda client, long: client.post("/generate", json={"prompt": "x", long: 1}),
        lambda client, long: client.post("/generate", json={"prompt": "x", "compression": {f"{long}.": 1}}),
        lambda client, long: client.post("/generate", content=b"{}", headers={"Content-Type": long}),
        lambda client, long: client.post("/generate", json={"prompt": "x", "compression": {"weights": long}}),
        lambda client, long: client.post("/generate", json={"prompt": "x", "n": [long] * 9}),
        lambda client, long: client.post("/generate", json={"prompt_token_ids": [int("9" * 900)]}),
        lambda client, long: client.get(f"/{long}"),
        lambda client, long: client.request(long.upper(), "/generate"),
    ],
)
def test_what_is_long_is_told_by_its_beginning(
    client: httpx.Client, ask: Callable[..., httpx.Response]
) -> None:
    response = ask(client, "a" * 150)
    assert response.status_code in (400, 404, 405)
    error = error_of(response)
    assert "…" in error["message"]
    for said in (error["message"], error["param"] or ""):
        assert "a" * 61 not in said.lower()
        assert "9" * 61 not in said


def test_a_method_that_is_not_allowed_says_which_is(client: httpx.Client) -> None:
    response = client.get("/generate")
    assert response.headers["allow"] == "POST"
    assert "use POST" in error_of(response)["message"]


def test_the_api_key_is_asked_of_all_but_probes(serve: Serve) -> None:
    with serve(api_key="open sesame") as client:
        for path in ("/health", "/ready", "/metrics", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200, path
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "open sesame"}):
            for response in (
                client.post("/generate", json={"prompt": "x"}, headers=headers),
                client.get("/info", headers=headers),
            ):
                assert response.status_code == 401
                assert error_of(response)["type"] == "authentication_error"
                assert response.headers["www-authenticate"] == "Bearer"
                assert "open sesame" not in response.text
        known = {"Authorization": "Bearer open sesame"}
        body = {"prompt": "x", "max_new_tokens": 1}
        assert client.post("/generate", json=body, headers=known).status_code == 200


def test_without_the_key_a_large_body_is_not_read(serve: Serve) -> None:
    with serve(api_key="k") as client:
        assert client.post("/generate", content=b"x" * 5000).status_code == 401


def test_while_the_model_loads_the_process_lives_and_nothing_is_served(serve: Serve) -> None:
    with serve(ready=False) as client:
        assert client.get("/health").status_code == 200
        for response in (
            client.get("/ready"),
            client.get("/info"),
            client.get("/metrics"),
            client.post("/generate", json={"prompt": "x"}),
        ):
            assert response.status_code == 503
            assert "loading" in error_of(response)["message"]


def test_a_header_that_is_no_http_harms_nobody(client: httpx.Client) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=5) as raw:
        raw.sendall(b"NOT HTTP AT ALL\r\n\r\n")
        assert b"400" in raw.recv(1000)
    assert client.get("/health").status_code == 200
