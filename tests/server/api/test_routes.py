"""The other routes: scoring, tokens, information, health, metrics, and the OpenAPI that describes them all."""

import json
import math
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from exeunt.compression.variant import Variant
from exeunt.server.api.offer import Offer
from exeunt.server.api.schemas import CompressionOptions
from exeunt.server.engine import QueueFullError
from exeunt.server.engine_config import EngineConfig
from exeunt.server.request import ExitMode, FailureEvent


def test_score_says_every_tokens_logprob(client: httpx.Client, engine: Any) -> None:
    asked = {"token_ids": [97, 98, 99], "compression": {"early_exit": {"mode": "approximate"}}}
    body = client.post("/score", json=asked).json()
    assert body["tokens"] == [
        {"id": 97, "text": "", "logprob": None, "depth": None, "exit": None},
        {"id": 98, "text": "b", "logprob": -0.5, "depth": 1, "exit": "block_0"},
        {"id": 99, "text": "c", "logprob": -0.5, "depth": 4, "exit": "final"},
    ]
    assert body["logprob"] == -1.0
    assert body["perplexity"] == math.exp(0.5)
    assert body["depth"] == {
        "blocks": 4,
        "mean": 2.5,
        "exit_rate": 0.5,
        "by_exit": {"block_0": 1, "final": 1},
    }
    assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert body["compression"]["early_exit"]["max_disagreement"] == 0.05
    assert engine.requests[0].exits.threshold == 0.9


def test_score_of_one_token_has_no_perplexity(client: httpx.Client) -> None:
    body = client.post("/score", json={"token_ids": [97], "details": False}).json()
    assert (body["logprob"], body["perplexity"]) == (0, None)
    assert body["depth"]["mean"] is None
    assert "tokens" not in body


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "x", "token_ids": [1]}, "text"),
        ({"text": ""}, "text"),
        ({"text": "x" * 100}, "text"),
        ({"token_ids": [300]}, "token_ids[0]"),
        ({"prompt": "x"}, "prompt"),
        ({"text": "x", "compression": {"linear_block": True}}, "compression.linear_block"),
    ],
)
def test_score_refuses(client: httpx.Client, body: Any, param: str) -> None:
    response = client.post("/score", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_score_that_fails_or_finds_no_place(client: httpx.Client, engine: Any) -> None:
    engine.fail_at = 0
    engine.failure = FailureEvent("It broke.", "timeout", None)
    assert client.post("/score", json={"text": "abc"}).status_code == 504
    engine.refuse = QueueFullError(3)
    assert client.post("/score", json={"text": "abc"}).status_code == 429


def test_tokens_there_and_back(client: httpx.Client) -> None:
    body = client.post("/tokenize", json={"prompt": "ab"}).json()
    assert body == {
        "count": 3,
        "max_model_len": 100,
        "tokens": [299, 97, 98],
        "token_strs": ["<299>", "<97>", "<98>"],
    }
    plain = client.post("/tokenize", json={"prompt": "ab", "add_special_tokens": False}).json()
    assert plain["tokens"] == [97, 98]
    assert client.post("/detokenize", json={"tokens": plain["tokens"]}).json() == {"prompt": "ab"}
    assert client.post("/detokenize", json={"tokens": [300]}).status_code == 400


def test_long_texts_are_cut_into_tokens_as_short_ones_are(
    client: httpx.Client, serve: Callable[..., Any]
) -> None:
    with serve(max_body_bytes=20_000) as roomy:
        assert roomy.post("/tokenize", json={"prompt": "ab" * 5000}).json()["count"] == 10_001


def test_the_tokenizer_and_the_model_say_what_they_are(client: httpx.Client) -> None:
    assert client.get("/tokenizer_info").json() == {
        "tokenizer_class": "ByteTokenizer",
        "vocab_size": 300,
        "special_tokens": {"eos_token": "<eos>"},
        "has_chat_template": False,
    }
    models = client.get("/v1/models").json()
    assert models["object"] == "list"
    assert [(m["id"], m["object"], m["created"]) for m in models["data"]] == [
        ("tiny", "model", 1_700_000_000)
    ]


def test_info_of_a_plain_model(client: httpx.Client, engine: Any) -> None:
    body = client.get("/info").json()
    assert body["model"]["name"] == "tiny"
    assert body["model"]["dtype"] == "float32"
    assert body["bundle"] is None
    assert body["modes"] == {
        "variants": [
            {"weights": "full", "kv_cache": "full", "linear_block": False},
            {"weights": "int4", "kv_cache": "int4", "linear_block": False},
        ],
        "weights": ["full", "int4"],
        "kv_cache": ["full", "int4"],
        "linear_block": [False],
        "early_exit": ["off", "verified", "approximate"],
        "skipped_kv": ["backfill", "propagate"],
    }
    assert body["defaults"]["early_exit"] == {"mode": "verified"}
    assert body["exits"] == ["block_0", "block_2"]
    assert body["limits"]["max_model_len"] == 100
    assert body["limits"]["max_choices"] == 8
    assert body["limits"]["max_tokens_by_kv_cache"] == {"full": 100, "int4": 100}
    engine.held["full"] = 60
    assert client.get("/info").json()["limits"]["max_tokens_by_kv_cache"] == {"full": 60, "int4": 100}
    assert "torch" in body["versions"]


def test_health_and_readiness(client: httpx.Client, reopen: Callable[..., Any]) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    reopen().drains()
    assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 503
    assert client.post("/generate", json={"prompt": "x"}).status_code == 503
    assert client.get("/info").status_code == 200
    assert 'exeunt_ready{model_name="tiny"} 0.0' in client.get("/metrics").text


def test_metrics_are_prometheus_text(client: httpx.Client) -> None:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'exeunt_ready{model_name="tiny"} 1.0' in response.text


def test_openapi_describes_every_route_and_its_errors(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    paths = document["paths"]
    assert set(paths) == {
        *("/generate", "/score", "/info", "/v1/models", "/tokenize", "/detokenize", "/tokenizer_info"),
        *("/health", "/ready", "/metrics"),
    }
    for path, methods in paths.items():
        for operation in methods.values():
            responses = operation["responses"]
            assert "default" in responses, path
            assert "422" not in responses, path
            for status, response in responses.items():
                schema = response["content"].get("application/json", {}).get("schema")
                if status == "default" or int(status) >= 400:
                    assert schema == {"$ref": "#/components/schemas/ErrorResponse"}, (path, status)
                elif path != "/metrics":
                    assert schema is not None, path
    generate = paths["/generate"]["post"]
    assert generate["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/GenerateBody")
    assert set(generate["responses"]) == {
        "200",
        "400",
        "401",
        "408",
        "413",
        "415",
        "429",
        "500",
        "503",
        "504",
        "default",
    }
    assert set(generate["responses"]["429"]["headers"]) == {"Retry-After"}
    assert generate["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith(
        "/GenerateResponse"
    )
    body = document["components"]["schemas"]["GenerateBody"]
    assert body["additionalProperties"] is False
    assert body["properties"]["max_new_tokens"]["default"] == 64
    early_exit = document["components"]["schemas"]["CompressionOptions"]["properties"]["early_exit"]
    assert {"type": "boolean"} in early_exit["anyOf"]
    answer = document["components"]["schemas"]["GenerateResponse"]["properties"]
    assert not [name for name in ("text", "finish_reason", "tokens", "choices") if "default" in answer[name]]
    assert "ValidationError" not in str(document)


def test_openapi_names_the_events_of_a_stream(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    content = document["paths"]["/generate"]["post"]["responses"]["200"]["content"]
    named = [schema["$ref"].split("/")[-1] for schema in content["text/event-stream"]["schema"]["oneOf"]]
    assert named == ["StreamStep", "GenerateResponse", "ErrorResponse"]
    assert set(schemas["StreamStep"]["properties"]) == {"id", "index", "text", "tokens"}
    assert set(schemas["ErrorDetail"]["properties"]) == {"message", "type", "param", "code"}
    body = {"prompt": "x", "max_new_tokens": 2, "stream": True}
    events = [
        line[6:] for line in client.post("/generate", json=body).text.splitlines() if line[:6] == "data: "
    ]
    steps, last = [json.loads(event) for event in events[:-2]], json.loads(events[-2])
    assert all(set(step) == set(schemas["StreamStep"]["properties"]) for step in steps)
    assert (
        set(schemas["GenerateResponse"]["required"])
        <= set(last)
        <= set(schemas["GenerateResponse"]["properties"])
    )


def test_every_reference_of_openapi_leads_somewhere(client: httpx.Client) -> None:
    text = client.get("/openapi.json").text
    document = json.loads(text)
    for reference in set(re.findall(r'"#/([^"]+)"', text)):
        found = document
        for part in reference.split("/"):
            found = found[part]


def examples(document: Any) -> dict[str, Any]:
    """The example of each route that takes a body, by its path."""
    return {
        path: operation["requestBody"]["content"]["application/json"]["example"]
        for path, methods in document["paths"].items()
        for operation in methods.values()
        if "requestBody" in operation
    }


INT4_ALONE = Variant(weights="int4", kv_cache="int4")
MODES: tuple[ExitMode, ...] = ("off", "verified", "approximate")


@pytest.mark.parametrize(
    ("changes", "early_exit"),
    [
        ({}, {"mode": "approximate", "max_disagreement": 0.1}),
        (
            {"defaults": CompressionOptions.model_validate({"weights": "full", "kv_cache": "full"})},
            {"mode": "approximate", "max_disagreement": 0.01},
        ),
        ({"offer": Offer((INT4_ALONE,), INT4_ALONE, ("block_0",), MODES)}, {"mode": "verified"}),
        (
            {"defaults": CompressionOptions.model_validate({"early_exit": {"skipped_kv": "backfill"}})},
            {"mode": "verified"},
        ),
        ({"offer": Offer((Variant(),), Variant())}, False),
        ({"config": EngineConfig(max_model_len=28, max_num_seqs=8, max_num_queued_reqs=3)}, None),
    ],
    ids=[
        "certified",
        "other default",
        "nothing certified",
        "certified otherwise",
        "bare checkpoint",
        "short",
    ],
)
def test_every_example_of_openapi_is_answered_by_that_very_server(
    client: httpx.Client, reopen: Callable[..., Any], changes: dict[str, Any], early_exit: Any
) -> None:
    reopen(**changes)
    shown = examples(client.get("/openapi.json").json())
    assert set(shown) == {"/generate", "/score", "/tokenize", "/detokenize"}
    for path, body in shown.items():
        response = client.post(path, json=body)
        assert response.status_code == 200, (path, body, response.text)
    if early_exit is not None:
        assert shown["/generate"]["compression"] == {"early_exit": early_exit}


def test_before_a_model_is_loaded_the_examples_are_what_every_model_takes(serve: Callable[..., Any]) -> None:
    with serve(ready=False) as server:
        assert examples(server.get("/openapi.json").json())["/generate"] == {
            "prompt": "It was a dark night",
            "max_new_tokens": 32,
        }


@pytest.mark.parametrize("key", [None, "secret"])
def test_openapi_says_which_routes_want_the_key(serve: Callable[..., Any], key: str | None) -> None:
    with serve(api_key=key) as server:
        document = server.get("/openapi.json").json()
        assert document["components"]["securitySchemes"]["ApiKey"]["scheme"] == "bearer"
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                status = server.request(method, path, json={}).status_code
                assert (status == 401) == (operation["security"] == [{"ApiKey": []}]), path
                if operation["security"] == []:
                    assert path in {"/health", "/ready", "/metrics"}
                elif key is None:
                    assert operation["security"] == [{"ApiKey": []}, {}]


def test_the_documentation_needs_no_other_server(client: httpx.Client) -> None:
    response = client.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    assert "openapi.json" in response.text
    assert "http://" not in response.text
    assert "https://" not in response.text
    assert "src=" not in response.text
    assert "-H 'Authorization: Bearer KEY'" in response.text


def undescribed(schema: Any, at: str) -> list[str]:
    """The properties of a JSON schema, at whatever depth, that lack a description."""
    found = []
    if isinstance(schema, list):
        schema = dict(enumerate(schema))
    if isinstance(schema, dict):
        for key, part in schema.items():
            if key == "properties":
                found += [f"{at}.{name}" for name, field in part.items() if not field.get("description")]
            found += undescribed(part, f"{at}.{key}")
    return found


def test_openapi_describes_every_field(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert undescribed({"properties": {"a": {"description": "x", "properties": {"b": {}}}}}, "") != []
    assert undescribed(document["components"]["schemas"], "schemas") == []
    for path, methods in document["paths"].items():
        assert undescribed(methods, path) == []
        for operation in methods.values():
            assert operation["summary"]
            assert operation["description"]
            assert all(parameter["description"] for parameter in operation.get("parameters", []))


@pytest.mark.parametrize("route", ["generate", "score"])
def test_a_model_without_exits_is_asked_for_none(
    client: httpx.Client, reopen: Callable[..., Any], route: str
) -> None:
    full = Variant()
    reopen(offer=Offer((full,), full))
    modes = client.get("/info").json()["modes"]
    assert (modes["early_exit"], modes["skipped_kv"]) == (["off"], [])
    text = {"text" if route == "score" else "prompt": "abc"}
    assert client.post(f"/{route}", json=text).json()["compression"]["early_exit"] == {"mode": "off"}
    refused = client.post(f"/{route}", json={**text, "compression": {"early_exit": True}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "compression.early_exit.mode"
    assert "'verified' and the loaded model has no exits; there is 'off'" in refused.text


def test_openapi_says_how_a_text_is_scored_in_every_mode(client: httpx.Client) -> None:
    described = client.get("/openapi.json").json()["paths"]["/score"]["post"]["description"]
    assert re.search(r"`verified`.*full depth", described, re.DOTALL)
