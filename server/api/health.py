"""`GET /health`, `GET /ready`, `GET /metrics` and `GET /docs`: what needs no API key."""

from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import HTMLResponse, Response

from exeunt.server.api.errors import documented
from exeunt.server.api.responses import HealthResponse, ReadyResponse
from exeunt.server.api.service import Service, loaded_service, serving_service
from exeunt.server.assets import page
from exeunt.server.metrics import CONTENT_TYPE

router = APIRouter()


@router.head("/health", include_in_schema=False)  # some load balancers probe with HEAD
@router.get("/health", summary="The process lives")
async def health() -> HealthResponse:
    """200 as long as the process answers, also while calibrating, loading and draining."""
    return HealthResponse()


@router.head("/ready", include_in_schema=False)
@router.get("/ready", summary="A request would be served", responses=documented(503))
async def ready(_: Annotated[Service, Depends(serving_service)]) -> ReadyResponse:
    """200 when a request would be served; 503 while calibrating (or waiting for another to), loading or draining."""
    return ReadyResponse()


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={
        **documented(503),
        200: {
            "content": {"text/plain": {"schema": {"type": "string"}}},
            "description": "Prometheus' text format.",
        },
    },
)
def metrics(service: Annotated[Service, Depends(loaded_service)]) -> Response:
    """Everything the server counts; there once the model is loaded."""
    return Response(service.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})


@router.get("/docs", include_in_schema=False)
async def docs() -> HTMLResponse:
    """A page that shows /openapi.json, without anything from other servers."""
    return HTMLResponse(page("docs.html"))
