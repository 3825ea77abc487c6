"""Headers and queries: nothing that a request says beside its body is ignored."""

import gzip
from collections.abc import Callable
from contextlib import AbstractContextManager

import httpx
import pytest

from tests.server.api.conftest import error_of

JSON = {"Content-Type": "application/json"}
Serve = Callable[..., AbstractContextManager[httpx.Client]]


def test_another_content_type_is_named(client: httpx.Client) -> None:
    response = client.post("/generate", content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"})
    assert response.status_code == 400
    assert error_of(response)["code"] == "content_type"
    assert "text/plain" in error_of(response)["message"]
    assert "application/json" in error_of(response)["message"]


def test_a_body_without_a_content_type_is_refused(client: httpx.Client) -> None:
    response = client.post("/generate", content=b'{"prompt": "x"}')
    assert "content-type" not in response.request.headers
    assert (response.status_code, error_of(response)["code"]) == (400, "content_type")
    assert "content type is none" in error_of(response)["message"]


def test_two_content_types_are_both_named(client: httpx.Client) -> None:
    types = [("Content-Type", "text/plain"), ("Content-Type", "application/json")]
    error = error_of(client.post("/generate", content=b"{}", headers=types))
    assert error["message"] == (
        "The body's content type is text/plain and application/json; "
        "send JSON with the one header Content-Type: application/json."
    )


def test_a_compressed_body_is_a_415(client: httpx.Client, counted: Callable[..., float]) -> None:
    packed = gzip.compress(b'{"prompt": "x", "max_new_tokens": 1}')
    response = client.post("/generate", content=packed, headers={**JSON, "Content-Encoding": "gzip"})
    assert response.status_code == 415
    assert error_of(response)["message"] == (
        "The body's Content-Encoding is gzip; send it as it is, without this header."
    )
    assert response.headers["accept-encoding"] == "identity"
    assert counted("admission_rejections_total", reason="invalid") == 1
    body = {"prompt": "x", "max_new_tokens": 1}
    assert client.post("/generate", json=body, headers={"Content-Encoding": "Identity"}).status_code == 200


@pytest.mark.parametrize("path", ["/generate", "/score", "/tokenize", "/detokenize"])
def test_a_query_is_not_ignored(client: httpx.Client, path: str) -> None:
    response = client.post(f"{path}?stream=true", json={"prompt": "x"})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"]) == ("unknown_parameter", "stream")
    assert error["message"] == f"Unknown query parameter stream; {path} takes none, say it in the body."


@pytest.mark.parametrize("path", ["/info", "/v1/models", "/tokenizer_info"])
def test_nor_is_it_where_something_is_got(client: httpx.Client, path: str) -> None:
    error = error_of(client.get(f"{path}?a[b]"))
    assert error["message"] == f'Unknown query parameter "a[b]"; {path} takes none, leave it out.'
    assert client.get(f"{path}?").status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/docs", "/openapi.json"])
def test_who_probes_may_add_what_defeats_caches(client: httpx.Client, path: str) -> None:
    assert client.get(f"{path}?now=1").status_code == 200


@pytest.mark.parametrize(("path", "status"), [("/health", 200), ("/ready", 503)])
def test_a_load_balancer_may_probe_with_head(serve: Serve, path: str, status: int) -> None:
    with serve(ready=False) as client:
        response = client.head(path)
        assert (response.status_code, response.content) == (status, b"")
        assert client.get("/openapi.json").json()["paths"][path].keys() == {"get"}
