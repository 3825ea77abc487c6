"""What every route works with: the loaded model, its engine, and whether requests would be served now."""

import asyncio
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Literal, TypeVar

from fastapi import Request

from exeunt.compression.model import LoadedModel
from exeunt.server.api.errors import ApiError, draining
from exeunt.server.api.offer import Offer
from exeunt.server.api.schemas import CompressionOptions
from exeunt.server.api.tokenizer import SharedTokenizer
from exeunt.server.engine import Engine
from exeunt.server.engine_config import EngineConfig
from exeunt.server.metrics import Metrics

T = TypeVar("T")
Phase = Literal["waiting", "calibrating", "loading", "ready", "draining"]


@dataclass(frozen=True, slots=True)
class Service:
    """A loaded model behind its engine, and the limits of the API in front of it."""

    name: str
    model: LoadedModel
    engine: Engine
    config: EngineConfig
    metrics: Metrics
    offer: Offer
    defaults: CompressionOptions
    created: int  # Unix time at which the model was loaded, seconds
    request_timeout_s: float
    max_body_bytes: int
    tokenizer: SharedTokenizer = field(init=False)
    _beside: ThreadPoolExecutor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokenizer", SharedTokenizer(self.model.tokenizer))
        object.__setattr__(self, "_beside", ThreadPoolExecutor(1, thread_name_prefix="exeunt-large"))

    def close(self) -> None:
        """Begin nothing more on threads; what they still do is not waited for."""
        self.tokenizer.close()
        self._beside.shutdown(wait=False, cancel_futures=True)

    async def beside(self, work: Callable[[], T], *, large: bool) -> T:
        """What `work` returns; what is large is done on a thread, one after the other, while the loop goes on."""
        if not large:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._beside, _uncollected, work)


def _uncollected(work: Callable[[], T]) -> T:
    """What `work` returns. Python's collector would go through its million values again and again, lock held."""
    gc.disable()  # there is one such thread, and nothing else turns it off
    try:
        return work()
    finally:
        gc.enable()


class Availability:
    """Whether requests are served: perhaps waiting or calibrating, then loading, ready, draining.

    Only the event loop changes it.
    """

    def __init__(self) -> None:
        self.phase: Phase = "loading"
        self.service: Service | None = None
        self.arriving: set[asyncio.Timeout] = set()  # bodies that come for nothing once the server drains

    def waits(self) -> None:
        """Another process calibrates the packaged model: its bundle is waited for."""
        self.phase = "waiting"

    def calibrates(self) -> None:
        """The packaged model is calibrated, once, which takes a while."""
        self.phase = "calibrating"

    def loads(self) -> None:
        """The model is loaded."""
        self.phase = "loading"

    def opens(self, service: Service) -> None:
        """The model is loaded: serve."""
        self.service, self.phase = service, "ready"
        service.metrics.set_ready(True)

    def drains(self) -> None:
        """Take no new requests, also of those whose bodies are not complete yet."""
        self.phase = "draining"
        for timeout in self.arriving:
            if not timeout.expired():
                timeout.reschedule(0.0)
        if self.service is not None:
            self.service.metrics.set_ready(False)

    def loaded(self) -> Service:
        """The service, ready or draining; 503 while the model is made ready, with what is being done."""
        if self.service is None:
            raise _UNREADY.get(self.phase, loading)()
        return self.service

    def serving(self) -> Service:
        """The service, where a request would be served; 503 otherwise."""
        service = self.loaded()
        if self.phase == "draining":
            raise draining()
        if not service.engine.alive:
            raise ApiError(
                503, "The engine has stopped; the server must be restarted.", code="engine_stopped"
            )
        return service


def calibrating() -> ApiError:
    """The error of a server whose model is calibrated first."""
    return ApiError(
        503,
        "The packaged model is being calibrated for its first use, which takes minutes; the server's log shows how "
        "far it is, try again later.",
        code="calibrating",
        headers={"Retry-After": "30"},
    )


def waiting() -> ApiError:
    """The error of a server that waits until another process has calibrated its model."""
    return ApiError(
        503,
        "Another process is calibrating the packaged model for its first use, which takes minutes; this server waits "
        "for its bundle, try again later.",
        code="waiting_for_calibration",
        headers={"Retry-After": "30"},
    )


def loading() -> ApiError:
    """The error of a server whose model is read."""
    return ApiError(
        503,
        "The model is still loading; try again shortly.",
        code="loading",
        headers={"Retry-After": "5"},
    )


_UNREADY: Final[dict[Phase, Callable[[], ApiError]]] = {
    "waiting": waiting,
    "calibrating": calibrating,
    "draining": draining,
}


def availability_of(request: Request) -> Availability:
    """The application's state of service."""
    found = request.app.state.availability
    if not isinstance(found, Availability):
        raise TypeError(f"app.state.availability is {found!r}")
    return found


async def loaded_service(request: Request) -> Service:
    """A route's dependency: the loaded service, also while draining."""
    return availability_of(request).loaded()


async def serving_service(request: Request) -> Service:
    """A route's dependency: the service, if it takes requests now."""
    return availability_of(request).serving()
