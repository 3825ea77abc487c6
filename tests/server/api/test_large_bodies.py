"""Bodies of many values or keys: the first fault is told at once, and others are answered meanwhile."""

import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from exeunt.server.api import json_route, strict_json
from exeunt.server.api.errors import ApiError
from exeunt.server.api.json_body import read_body
from exeunt.server.api.json_route import INLINE_BYTES
from exeunt.server.api.schemas import Body, DetokenizeBody, GenerateBody, ScoreBody

Serve = Callable[..., AbstractContextManager[httpx.Client]]
PATIENCE_S = 30  # how long something is waited for that would otherwise never happen


@pytest.mark.parametrize(
    ("model", "field"),
    [(GenerateBody, "prompt_token_ids"), (ScoreBody, "token_ids"), (DetokenizeBody, "tokens")],
)
@pytest.mark.parametrize("value", [-1, ""])
def test_of_many_faulty_ids_only_the_first_is_looked_for(model: type[Body], field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as found:
        model.model_validate({field: [1, value, value, value]})
    assert found.value.error_count() == 1
    assert found.value.errors()[0]["loc"] == (field, 1)


@pytest.mark.parametrize(("model", "field"), [(GenerateBody, "prompt_token_ids"), (ScoreBody, "token_ids")])
def test_more_ids_than_the_model_takes_are_refused_by_their_number(model: type[Body], field: str) -> None:
    with pytest.raises(ApiError, match="has 101 tokens; the limit") as refused:
        read_body(json.dumps({field: [-1] * 101}).encode(), model, 100)
    assert (refused.value.code, refused.value.param) == ("too_long", field)


def test_unknown_fields_are_refused_before_values_are_looked_at() -> None:
    body = {"prompt": 5, **{f"key_{number}": number for number in range(1000)}}
    with pytest.raises(ApiError, match="Unknown field key_0; known are compression, ") as refused:
        read_body(json.dumps(body).encode(), GenerateBody, 100)
    assert refused.value.param == "key_0"


def test_a_body_is_parsed_once_where_no_key_can_be_there_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def second(*_: Any, **__: Any) -> None:
        raise AssertionError("parsed a second time")

    monkeypatch.setattr(json, "loads", second)
    body = {"prompt_token_ids": [1, 2], "stop": ["a"], "compression": {"early_exit": {"mode": "off"}}}
    for text in (json.dumps(body), json.dumps(body).encode(), b"[]", b"3"):
        strict_json.parse_json(text)
    for text in (b'{"a": 1, "a": 2}', b'{"a": [{"b": 1}]}', b'{"a": "b:"}'):
        with pytest.raises(AssertionError, match="second time"):
            strict_json.parse_json(text)


def test_others_are_answered_while_a_large_body_is_read(
    serve: Serve, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work, go_on = threading.Event(), threading.Event()

    def gated(content: bytes, *rest: Any) -> Any:
        if len(content) > INLINE_BYTES:
            at_work.set()
            assert go_on.wait(PATIENCE_S), "nobody was answered meanwhile"
        return read_body(content, *rest)

    monkeypatch.setattr(json_route, "read_body", gated)
    answers: list[httpx.Response] = []
    with serve(max_body_bytes=1 << 20) as client:
        padded = json.dumps({"prompt": "x", "max_new_tokens": 1}).encode() + b" " * INLINE_BYTES
        headers = {"Content-Type": "application/json"}
        large = threading.Thread(
            target=lambda: answers.append(client.post("/generate", content=padded, headers=headers))
        )
        large.start()
        assert at_work.wait(PATIENCE_S)
        assert client.get("/health").status_code == 200
        assert client.post("/generate", json={"prompt": "y", "max_new_tokens": 1}).status_code == 200
        assert not answers
        go_on.set()
        large.join(PATIENCE_S)
    assert answers[0].status_code == 200, answers[0].text
