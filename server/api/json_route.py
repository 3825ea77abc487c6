"""Routes that take a JSON body: how it is waited for and read."""

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from exeunt.server.api.errors import client_left
from exeunt.server.api.json_body import read_body
from exeunt.server.api.service import Availability, Service, availability_of

INLINE_BYTES: Final = 64 * 1024  # a body up to here is read on the event loop, in about a millisecond


class StrictJSONRequest(Request):
    """A request whose JSON is read as `json_body` does.

    Args:
        model: what the body must be.
        ask: the service if it takes such requests now; raises ApiError 503 otherwise.
    """

    def __init__(
        self, scope: Scope, receive: Receive, model: type[BaseModel], ask: Callable[[Availability], Service]
    ) -> None:
        super().__init__(scope, receive)
        self._model, self._ask = model, ask

    async def body(self) -> bytes:
        """The whole body; raises ApiError where the client left before it had sent it, which is counted as that."""
        try:
            return await super().body()
        except ClientDisconnect as error:
            raise client_left(self.scope) from error

    async def json(self) -> Any:
        """The body as its model; raises ApiError."""
        content = await self.body()
        service = self._ask(availability_of(self))
        read = partial(read_body, content, self._model, service.config.max_model_len)
        return await service.beside(read, large=len(content) > INLINE_BYTES)


class StrictJSONRoute(APIRoute):
    """A route that reads its body, where it takes one, as `StrictJSONRequest` does, and needs the model for it."""

    def service(self, availability: Availability) -> Service:
        """The service if it takes requests of this route now; raises ApiError 503 otherwise."""
        return availability.loaded()

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The framework's handler around our request."""
        handle = super().get_route_handler()
        model = self.body_field.field_info.annotation if self.body_field is not None else None

        async def handle_strictly(request: Request) -> Response:
            if isinstance(model, type) and issubclass(model, BaseModel):
                request = StrictJSONRequest(request.scope, request.receive, model, self.service)
            return await handle(request)

        return handle_strictly


class EngineRoute(StrictJSONRoute):
    """One whose requests go to the engine: none while it drains."""

    def service(self, availability: Availability) -> Service:
        """The service if a request would be served now; raises ApiError 503 otherwise."""
        return availability.serving()
