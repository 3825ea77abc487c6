"""The application: its routes and what stands before them."""

from collections.abc import Sequence
from importlib.metadata import version

from fastapi import FastAPI
from starlette.middleware import Middleware

from exeunt.server.api import generate, health, info, score, tokens
from exeunt.server.api.auth import ApiKeyGate
from exeunt.server.api.body import BodyLimit
from exeunt.server.api.errors import ErrorBoundary, install_error_handlers
from exeunt.server.api.openapi import describe
from exeunt.server.api.origins import Origins
from exeunt.server.api.outcome import OutcomeCount
from exeunt.server.api.service import Availability

_DESCRIPTION = (
    "An inference server that spends on each token only the computation that token needs: "
    "every request says which savings it wants, every token says at which depth it left."
)


def create_app(
    availability: Availability,
    *,
    max_body_bytes: int,
    api_key: str | None = None,
    allowed_origins: Sequence[str] = (),
) -> FastAPI:
    """The application. It answers at once; requests are served when `availability` opens.

    Args:
        availability: holds the service once its model is loaded.
        max_body_bytes: the largest body accepted.
        api_key: asked of every request but those of probes, scrapers and the documentation; None: nobody is asked.
        allowed_origins: the browser origins that may ask (CORS); `*` is any.
    """
    gates = [Middleware(OutcomeCount), Middleware(ErrorBoundary)]
    if allowed_origins:
        gates.insert(0, Middleware(Origins, allowed=allowed_origins))
    if api_key is not None:
        gates.append(Middleware(ApiKeyGate, api_key=api_key))
    gates.append(Middleware(BodyLimit, max_bytes=max_body_bytes))
    app = FastAPI(
        title="Exeunt",
        version=version("exeunt"),
        description=_DESCRIPTION,
        license_info={"name": "Apache-2.0"},
        middleware=gates,
        redirect_slashes=False,  # /generate/ is not a route; a redirect would turn an error into a puzzle
        docs_url=None,  # the framework's page loads its script from elsewhere; ours is in health.py
        redoc_url=None,
    )
    app.state.availability = availability
    install_error_handlers(app)
    for routes in (generate, score, info, tokens, health):
        app.include_router(routes.router)
    describe(app, availability, key_required=api_key is not None)
    return app
