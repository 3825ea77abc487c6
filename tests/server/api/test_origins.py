"""CORS: browsers may ask from the origins that are allowed, and others are told."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import httpx

from tests.server.api.conftest import error_of

Serve = Callable[..., AbstractContextManager[httpx.Client]]


def test_browsers_may_ask_from_allowed_origins_only(serve: Serve) -> None:
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    with serve(allowed_origins=("http://here",), api_key="k") as client:
        allowed = client.options("/generate", headers={"Origin": "http://here", **preflight})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "http://here"
        refused = client.options("/generate", headers={"Origin": "http://there", **preflight})
        assert refused.status_code == 400
        assert "access-control-allow-origin" not in refused.headers
        assert "Origin" in refused.headers["vary"]
        assert error_of(refused)["code"] == "cors_refused"
        assert '"http://there" may not ask this server; name it in --allowed-origins' in refused.text.replace(
            "\\", ""
        )
        strange = {**preflight, "Access-Control-Request-Method": "BREW"}
        refused = client.options("/generate", headers={"Origin": "http://here", **strange})
        assert '"BREW"; use DELETE, GET,' in error_of(refused)["message"]
        unauthorized = client.post("/generate", json={}, headers={"Origin": "http://here"})
        assert unauthorized.status_code == 401
        assert unauthorized.headers["access-control-allow-origin"] == "http://here"
        assert unauthorized.headers["access-control-expose-headers"] == "Retry-After"
