"""CORS: which browser origins may ask, and how others are told."""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from exeunt.server.api.errors import bad_request
from exeunt.server.api.validation import shown


class Origins(CORSMiddleware):
    """The framework's middleware, whose refusals have the shape of every error.

    Args:
        app: what is asked.
        allowed: the origins that may ask; `*` is any.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=list(allowed),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a browser that asks whether it may ask."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        refused = bad_request(self._why(request_headers), code="cors_refused").response
        kept = ((name, value) for name, value in response.raw_headers if not name.startswith(b"content-"))
        refused.raw_headers.extend(kept)
        return refused

    def _why(self, request_headers: Headers) -> str:
        origin, method = request_headers["origin"], request_headers["access-control-request-method"]
        if not self.is_allowed_origin(origin):
            return f"The origin {shown(origin)} may not ask this server; name it in --allowed-origins if it is to."
        if method not in self.allow_methods:
            return (
                f"Browsers may not ask with the method {shown(method)}; use {', '.join(self.allow_methods)}."
            )
        return (
            f"The origin {shown(origin)} asks for a private network's server, which this one does not allow."
        )
