"""Every error the API answers with: one shape, one sentence that says what was wrong and what to do."""

import asyncio
import logging
import uuid
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from exeunt.server.api.outcome import Outcome, outcome_of
from exeunt.server.api.validation import describe, shortened
from exeunt.server.metrics import FailureReason, RejectionReason

logger = logging.getLogger("exeunt.api")

CLIENT_CLOSED_REQUEST: Final = 499  # the status of proxies for a client that left; nobody receives it

_TYPES: Final = {
    401: "authentication_error",
    408: "timeout_error",
    404: "not_found_error",
    429: "overloaded_error",
    500: "internal_error",
    503: "unavailable_error",
    504: "timeout_error",
}
_REJECTIONS: Final[dict[int, RejectionReason]] = {
    400: "invalid",
    401: "unauthorized",
    408: "invalid",
    413: "body_too_large",
    415: "invalid",
    429: "queue_full",
    503: "unavailable",
}
_FAILURES: Final[dict[int, FailureReason]] = {503: "shutdown", 504: "timeout"}  # after admission


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str = Field(description="One sentence: the value, the limit, what to do.")
    type: str = Field(description="The kind of error, e.g. `invalid_request_error`.")
    param: str | None = Field(description="The field at fault, as a path such as `compression.weights`.")
    code: str = Field(description="A stable word for programs, e.g. `unknown_field`.")


class ErrorResponse(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorDetail = Field(description="What was wrong, and what to do.")


class ApiError(HTTPException):
    """An error with everything its response says. Raised anywhere below a route."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        admitted: bool = False,
    ) -> None:
        """`admitted` says that the request was queued before it failed: it is counted as failed, not as refused."""
        super().__init__(status, message, headers)
        self.admitted = admitted
        self.param = param
        self.code = code

    @property
    def body(self) -> ErrorResponse:
        """The error as the response's body."""
        kind = _TYPES.get(self.status_code, "invalid_request_error")
        return ErrorResponse(
            error=ErrorDetail(message=self.detail, type=kind, param=self.param, code=self.code)
        )

    @property
    def response(self) -> Response:
        """The error as a response."""
        return Response(
            self.body.model_dump_json(), self.status_code, self.headers, media_type="application/json"
        )


def bad_request(message: str, *, code: str = "invalid_value", param: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, code=code, param=param)


def internal_error(error_id: str) -> ApiError:
    """A 500 that names the id under which the log has the details."""
    return ApiError(
        500,
        f"The server has a bug; its log has the details under error id {error_id}.",
        code="internal_error",
    )


def draining() -> ApiError:
    """The error of a server that takes no more requests."""
    return ApiError(
        503,
        "The server is shutting down and takes no new requests; try another one.",
        code="draining",
        headers={"Retry-After": "5"},
    )


def client_left(scope: Scope) -> ApiError:
    """The error of a client that left before its request could be worked on; it is counted as that."""
    outcome_of(scope).client_left()
    message = "The client left before its request was worked on."
    return ApiError(CLIENT_CLOSED_REQUEST, message, code="client_left")


def log_bug(error: BaseException, where: str) -> str:
    """Log an unexpected exception and return the id it is logged under."""
    error_id = uuid.uuid4().hex[:12]
    logger.error("%s failed (error id %s)", where, error_id, exc_info=error)
    return error_id


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries of a route's error responses."""
    texts = {
        400: "Malformed or not servable; the message says the value and the limit.",
        401: "No API key, or a wrong one.",
        408: "The body did not come in time.",
        413: "The body is larger than the server accepts.",
        415: "The body is compressed, which the header Content-Encoding says.",
        429: "The queue is full.",
        500: "A bug; the message has the id under which the log has the details.",
        503: "Calibrating, loading or draining.",
        504: "Timed out before its body was read, at the tokenizer, or before the first token.",
    }
    headers = {
        401: _header("WWW-Authenticate", "Bearer"),
        429: _header("Retry-After", "When to come back, seconds."),
        503: _header("Retry-After", "When to come back, seconds; absent where the engine has stopped."),
    }
    return {
        status: {"model": ErrorResponse, "description": texts[status], "headers": headers.get(status, {})}
        for status in statuses
    }


def _header(name: str, text: str) -> dict[str, Any]:
    return {name: {"description": text, "schema": {"type": "string"}}}


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of the framework, and our own, leave in one shape."""
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)


async def _on_http_error(request: Request, error: Exception) -> Response:
    return respond(request.scope, _as_api_error(request.scope, error))


async def _on_invalid_body(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    problem = describe(error.errors(), request.scope)
    return respond(request.scope, bad_request(problem.message, code=problem.code, param=problem.param))


def _as_api_error(scope: Scope, error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, HTTPException):
        raise error
    path, method = shortened(scope["path"]), shortened(scope["method"])
    headers = dict(error.headers or {})
    if error.status_code == 404:
        instead = (
            "POST /generate continues a prompt, and " if path.rstrip("/").endswith("completions") else ""
        )
        return ApiError(
            404, f"There is no route {path}; {instead}/docs lists what there is.", code="not_found"
        )
    if error.status_code == 405:
        allowed = headers.get("Allow", headers.get("allow", "another method"))
        message = f"{path} does not take {method}; use {allowed}."
        return ApiError(405, message, code="method_not_allowed", headers=headers)
    return ApiError(error.status_code, str(error.detail), code="http_error", headers=headers)


def respond(scope: Scope, error: ApiError) -> Response:
    """The response of an error, which is the outcome of its request."""
    count_error(outcome_of(scope), error)
    return error.response


def count_error(outcome: Outcome, error: ApiError) -> None:
    """Count an error as the end of its request: not let in, or failed after it was."""
    status = error.status_code
    if error.admitted or status not in _REJECTIONS:
        outcome.failed(_FAILURES.get(status, "internal"))
    else:
        outcome.rejected(_REJECTIONS[status])


class ErrorBoundary:
    """Turns whatever escapes the routes and the middleware below into a response of our shape."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except ApiError as error:
            await respond(scope, error)(scope, receive, send)
        except asyncio.CancelledError:  # the server ends and waits no longer
            if started:  # its connection is closed; to raise would be a traceback in the log for each
                return
            await respond(scope, draining())(scope, receive, send)
        except Exception as error:  # noqa: BLE001 -- the outermost boundary: a bug ends one request, not the server
            problem = internal_error(log_bug(error, f"{scope['method']} {scope['path']}"))
            count_error(outcome_of(scope), problem)
            if not started:
                await problem.response(scope, receive, send)
