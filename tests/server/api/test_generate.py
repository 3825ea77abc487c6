"""`POST /generate` over real HTTP: answers, streams, clients that leave, requests that fail."""

import json
import math
import re
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from exeunt.server.api.responses import StreamStep
from exeunt.server.engine import EngineStoppedError, QueueFullError, RequestTooLargeError
from exeunt.server.request import FailureEvent
from tests.server.api.conftest import error_of

Counted = Callable[..., float]


def events(response: httpx.Response) -> list[Any]:
    """The `data:` objects of a stream, its end mark as a string."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_an_event_is_what_its_schema_would_write(client: httpx.Client) -> None:
    """Events are written from plain values; the schema, which the documentation shows, must not drift from them."""
    for details in (True, False):
        body = {"prompt": "x", "stream": True, "details": details}
        *steps, _, end = client.post("/generate", json=body).content.rstrip().split(b"\n\n")
        assert steps
        assert end == b"data: [DONE]"
        for step in steps:
            written = step.removeprefix(b"data: ")
            read = StreamStep.model_validate_json(written, strict=True)
            assert read.model_dump_json(exclude_unset=True).encode() == written


def test_a_whole_answer(client: httpx.Client, engine: Any) -> None:
    response = client.post("/generate", json={"prompt": "hi", "max_new_tokens": 3})
    assert response.status_code == 200, response.text
    body = response.json()
    identity = body.pop("id")
    assert identity.startswith("gen-")
    assert abs(body.pop("created") - time.time()) < 60
    assert body == {
        "model": "tiny",
        "text": "abc",
        "finish_reason": "length",
        "tokens": [
            {"id": 97, "text": "a", "logprob": -0.5, "depth": 4, "exit": "final"},
            {"id": 98, "text": "b", "logprob": -0.5, "depth": 1, "exit": "block_0"},
            {"id": 99, "text": "c", "logprob": -0.5, "depth": 4, "exit": "final"},
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
        "compression": {
            "weights": "int4",
            "kv_cache": "int4",
            "linear_block": False,
            "early_exit": {"mode": "verified"},
        },
        "depth": {
            "blocks": 4,
            "mean": 3.0,
            "exit_rate": 1 / 3,
            "by_exit": {"final": 2, "block_0": 1},
            "blocks_executed": 9,
            "blocks_skipped": 3,
            "blocks_wasted": 0,
            "block_passes": 9,
            "drafts": 0,
            "drafts_accepted": 0,
        },
        "perplexity": math.exp(0.5),
        "timing": {"queue_s": 0.001, "time_to_first_token_s": 0.002, "total_s": 0.01},
    }
    assert engine.requests[0].prompt_token_ids == (299, *b"hi")


def test_every_sampling_field_reaches_the_engine(client: httpx.Client, engine: Any) -> None:
    asked = {
        "prompt_token_ids": [1, 2],
        "max_new_tokens": 5,
        "min_new_tokens": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "repetition_penalty": 1.1,
        "seed": 7,
        "stop": ["x", "yz"],
        "ignore_eos": True,
        "n": 2,
        "compression": {
            "weights": "full",
            "kv_cache": "full",
            "early_exit": {"mode": "approximate", "threshold": 0.25},
        },
    }
    assert client.post("/generate", json=asked).status_code == 200
    request = engine.requests[0]
    sampling = request.sampling
    assert request.prompt_token_ids == (1, 2)
    assert request.n == 2
    assert (sampling.max_new_tokens, sampling.min_new_tokens, sampling.ignore_eos) == (5, 2, True)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.9, 40)
    assert (sampling.repetition_penalty, sampling.seed, sampling.stop) == (1.1, 7, ("x", "yz"))
    assert (request.variant.weights, request.variant.kv_cache) == ("full", "full")
    assert (request.exits.mode, request.exits.threshold, request.exits.target) == ("approximate", 0.25, None)
    # to the last bit but where the clock passes a power of two in between
    assert request.deadline - request.arrival == pytest.approx(60.0)


def test_without_a_seed_every_request_draws_its_own(client: httpx.Client, engine: Any) -> None:
    for _ in range(2):
        client.post("/generate", json={"prompt": "x", "max_new_tokens": 1})
    assert engine.requests[0].sampling.seed != engine.requests[1].sampling.seed


def test_several_answers_stand_in_choices(client: httpx.Client) -> None:
    body = client.post("/generate", json={"prompt": "x", "max_new_tokens": 2, "n": 3}).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert set(body["choices"][0]) == {"index", "text", "finish_reason", "tokens", "depth", "perplexity"}
    assert set(body) == {"id", "model", "created", "choices", "usage", "compression", "timing"}
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}


def test_without_details_there_are_no_tokens(client: httpx.Client) -> None:
    asked = {"prompt": "x", "max_new_tokens": 2, "details": False}
    assert "tokens" not in client.post("/generate", json=asked).json()
    several = client.post("/generate", json={**asked, "n": 2}).json()
    assert all("tokens" not in choice for choice in several["choices"])
    streamed = events(client.post("/generate", json={**asked, "stream": True}))
    assert all("tokens" not in event for event in streamed[:-1])


def test_a_stream_has_steps_a_summary_and_an_end(client: httpx.Client) -> None:
    response = client.post("/generate", json={"prompt": "x", "max_new_tokens": 3, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *steps, summary, end = events(response)
    assert end == "[DONE]"
    assert "".join(step["text"] for step in steps) == "abc"
    assert [token["exit"] for step in steps for token in step["tokens"]] == ["final", "block_0", "final"]
    assert set(steps[0]) == {"id", "index", "text", "tokens"}
    assert set(summary) == {
        *("id", "model", "created", "finish_reason", "usage", "compression", "depth", "perplexity", "timing"),
    }
    assert summary["depth"]["mean"] == 3.0


def test_a_stream_of_several_answers_says_whose_text_it_is(client: httpx.Client) -> None:
    *steps, summary, _ = events(
        client.post("/generate", json={"prompt": "x", "max_new_tokens": 2, "n": 2, "stream": True})
    )
    for index in (0, 1):
        assert "".join(step["text"] for step in steps if step["index"] == index) == "ab"
    assert [choice["index"] for choice in summary["choices"]] == [0, 1]
    assert "text" not in summary["choices"][0]


def test_tokens_of_a_stream_come_as_they_are_made(client: httpx.Client, engine: Any) -> None:
    engine.before_gate = 1
    engine.gate.clear()
    with client.stream(
        "POST", "/generate", json={"prompt": "x", "max_new_tokens": 2, "stream": True}
    ) as response:
        chunks = response.iter_text()
        assert json.loads(next(chunks).removeprefix("data: "))["text"] == "a"
        engine.gate.set()
        assert "[DONE]" in "".join(chunks)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("before_gate", [0, 1])
def test_a_client_that_leaves_ends_its_request(
    client: httpx.Client, engine: Any, counted: Counted, stream: bool, before_gate: int
) -> None:
    engine.before_gate = before_gate
    engine.gate.clear()
    leaving = httpx.Client(base_url=client.base_url, timeout=httpx.Timeout(5, read=0.2))
    with pytest.raises(httpx.ReadTimeout), leaving:
        leaving.post("/generate", json={"prompt": "x", "max_new_tokens": 5, "stream": stream})
    assert engine.gone.wait(5), "the engine was not told"
    assert engine.cancelled == [engine.requests[0].id]
    assert counted("client_disconnects_total") == 1
    engine.gate.set()
    assert client.post("/generate", json={"prompt": "x", "max_new_tokens": 1}).status_code == 200


def test_a_finished_request_is_not_cancelled(client: httpx.Client, engine: Any, counted: Counted) -> None:
    for stream in (True, False):
        client.post("/generate", json={"prompt": "x", "max_new_tokens": 2, "stream": stream})
    assert engine.cancelled == []
    assert counted("client_disconnects_total") == 0


def test_a_full_queue_is_a_429_that_says_when_to_come_back(
    client: httpx.Client, engine: Any, counted: Counted
) -> None:
    engine.refuse = QueueFullError(3)
    response = client.post("/generate", json={"prompt": "x"})
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert error_of(response)["code"] == "queue_full"
    assert "3" in error_of(response)["message"]
    assert counted("admission_rejections_total", reason="queue_full") == 1


def test_a_stopped_engine_is_a_503(client: httpx.Client, engine: Any, counted: Counted) -> None:
    engine.refuse = EngineStoppedError("stopped")
    response = client.post("/generate", json={"prompt": "x"})
    assert response.status_code == 503
    assert "retry-after" in response.headers
    assert counted("admission_rejections_total", reason="unavailable") == 1


def test_a_request_beyond_the_cache_is_a_400(client: httpx.Client, engine: Any) -> None:
    engine.refuse = RequestTooLargeError(99, 32)
    response = client.post("/generate", json={"prompt": "x"})
    assert response.status_code == 400
    assert "32" in error_of(response)["message"]
    assert error_of(response)["param"] == "max_new_tokens"


@pytest.mark.parametrize(
    ("kind", "status", "error_type"),
    [
        ("internal", 500, "internal_error"),
        ("timeout", 504, "timeout_error"),
        ("shutdown", 503, "unavailable_error"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_fails_before_its_first_token_has_a_status(
    client: httpx.Client, engine: Any, stream: bool, kind: Any, status: int, error_type: str
) -> None:
    engine.fail_at = 0
    engine.failure = FailureEvent("It broke.", kind, "err-17")
    response = client.post("/generate", json={"prompt": "x", "stream": stream})
    assert response.status_code == status
    assert error_of(response)["type"] == error_type
    assert ("err-17" in error_of(response)["message"]) == (kind == "internal")


def test_a_stream_that_fails_later_says_so_in_the_stream(client: httpx.Client, engine: Any) -> None:
    engine.fail_at = 2
    response = client.post("/generate", json={"prompt": "x", "stream": True})
    assert response.status_code == 200
    *_, error, end = events(response)
    assert error["error"]["type"] == "internal_error"
    assert "err-1" in error["error"]["message"]
    assert end == "[DONE]"


def test_a_whole_answer_that_fails_later_has_a_status(client: httpx.Client, engine: Any) -> None:
    engine.fail_at = 2
    assert client.post("/generate", json={"prompt": "x"}).status_code == 500


def test_an_engine_that_never_answers_is_a_504(
    client: httpx.Client, engine: Any, reopen: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exeunt.server.api.generate.GRACE_S", 0.1)
    reopen(request_timeout_s=0.1)
    engine.gate.clear()
    response = client.post("/generate", json={"prompt": "x"})
    assert response.status_code == 504
    assert "--request-timeout" in error_of(response)["message"]
    assert engine.cancelled == [engine.requests[0].id]


def test_a_bug_is_a_500_with_an_id_that_is_in_the_log(
    client: httpx.Client, engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine.refuse = RuntimeError("the secret reason")
    response = client.post("/generate", json={"prompt": "x"})
    assert response.status_code == 500
    message = error_of(response)["message"]
    error_id = message.rstrip(".").split()[-1]
    assert re.fullmatch(r"[0-9a-f]{12}", error_id), "as the engine's own ids are"
    assert error_id in caplog.text
    assert "secret" not in message
