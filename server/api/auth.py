"""The API key: who may ask."""

import hashlib
import hmac
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from exeunt.server.api.errors import ApiError

# Probes and scrapers carry no key, and neither the documentation nor these reveals anything about requests.
OPEN_PATHS: Final = frozenset({"/health", "/ready", "/metrics", "/docs", "/openapi.json"})


class ApiKeyGate:
    """Asks every request outside OPEN_PATHS for `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._digest = hashlib.sha256(api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            self._check(dict(scope["headers"]).get(b"authorization"))
        await self._app(scope, receive, send)

    def _check(self, header: bytes | None) -> None:
        if header is None:
            raise _unauthorized("The request has no API key; send the header Authorization: Bearer KEY.")
        scheme, _, key = header.partition(b" ")
        # Digests have one length and are compared in constant time: neither length nor prefix leaks.
        matches = hmac.compare_digest(hashlib.sha256(key.strip()).digest(), self._digest)
        if scheme.lower() != b"bearer" or not matches:
            raise _unauthorized("The API key is wrong; send the header Authorization: Bearer KEY.")


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
