"""Routes that ignore nothing they are sent, and how their JSON bodies are read."""

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, ClassVar, Final

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.types import Receive, Scope

from exeunt.server.api.arrival import BodyArrival, note_arrival
from exeunt.server.api.errors import ApiError, bad_request
from exeunt.server.api.json_body import read_body
from exeunt.server.api.service import Availability, Service, availability_of
from exeunt.server.api.turn import in_turn
from exeunt.server.api.validation import named, shortened

INLINE_BYTES: Final = 64 * 1024  # a body up to here is read on the event loop, in about a millisecond


class StrictRequest(Request):
    """A request whose body is JSON, read as `json_body` does."""

    def __init__(self, scope: Scope, receive: Receive, route: "StrictRoute", model: type[BaseModel]) -> None:
        super().__init__(scope, receive)
        self._route, self._model = route, model
        self._content: bytes | None = None

    async def body(self) -> bytes:
        """The whole body; raises ApiError where it does not come."""
        if self._content is None:
            arrival = BodyArrival(self.scope, availability_of(self), drained=self._route.drained)
            self._content = await arrival.whole(self.stream())
        return self._content

    async def json(self) -> Any:
        """The body as its model; raises ApiError."""
        content = await self.body()
        service = self._route.service(availability_of(self))
        read = partial(read_body, content, self._model, service.config.max_model_len)
        large = len(content) > INLINE_BYTES
        reading = service.beside(read, large=large)
        return await in_turn(self, service, reading, brief=not large, where="before its body was read")


class StrictRoute(APIRoute):
    """A route that takes no query, and a body, if any, that is JSON as it comes; it needs the model for it."""

    drained: ClassVar[bool] = False  # whether its requests are refused while the server drains

    def service(self, availability: Availability) -> Service:
        """The service if it takes requests of this route now; raises ApiError 503 otherwise."""
        return availability.serving() if self.drained else availability.loaded()

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The framework's handler around our request."""
        handle = super().get_route_handler()
        model = self.body_field.field_info.annotation if self.body_field is not None else None

        async def handle_strictly(request: Request) -> Response:
            note_arrival(request.scope)
            if isinstance(model, type) and issubclass(model, BaseModel):
                request = StrictRequest(request.scope, request.receive, self, model)
                await request.body()  # a client that still sends would not read that it is refused
                _check_encoding(request)
            _check_query(request)
            return await handle(request)

        return handle_strictly


class EngineRoute(StrictRoute):
    """One whose requests go to the engine: none while it drains."""

    drained = True


def _check_encoding(request: Request) -> None:
    encoding = ", ".join(request.headers.getlist("content-encoding"))
    if encoding.strip().lower() not in ("", "identity"):
        message = (
            f"The body's Content-Encoding is {shortened(encoding)}; send it as it is, without this header."
        )
        headers = {"Accept-Encoding": "identity"}
        raise ApiError(415, message, code="content_encoding", headers=headers)


def _check_query(request: Request) -> None:
    name = next(iter(request.query_params), None)
    if name is not None:
        instead = "leave it out" if request.method == "GET" else "say it in the body"
        raise bad_request(
            f"Unknown query parameter {named(name)}; {request.url.path} takes none, {instead}.",
            code="unknown_parameter",
            param=named(name),
        )
