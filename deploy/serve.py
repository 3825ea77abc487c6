"""`exeunt serve`: puts the pieces to work. Binds the port, loads the model, starts the engine, answers HTTP."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Final

import uvicorn

from exeunt.compression.model import LoadedModel
from exeunt.deploy.loading import SettingsError, Source, default_variant, engine_config, load_model
from exeunt.server.api.app import create_app
from exeunt.server.api.compression import NotOfferedError, resolve
from exeunt.server.api.offer import Offer, offer_of
from exeunt.server.api.schemas import CompressionOptions
from exeunt.server.api.service import Availability, Service
from exeunt.server.engine import Engine
from exeunt.server.metrics import Metrics, new_registry
from exeunt.server.settings import Settings

logger = logging.getLogger("exeunt.serve")

_LAST_BYTES_S: Final = 5  # seconds for answers that are complete to reach their clients
_KEEP_ALIVE_S: Final = 75  # longer than the idle time-outs of common proxies, which must not race with ours


class AddressError(OSError):
    """The address cannot be listened on; the message says why and what to do."""


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not yet listening: taken before the long work of loading starts.

    Raises:
        AddressError: the port is in use, or the host is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _address_error(host, port, error) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _address_error(host, port, error) from error
    return sock


def _address_error(host: str, port: int, error: OSError) -> AddressError:
    reason = (error.strerror or str(error)).lower()
    return AddressError(f"Cannot listen on {host}:{port}: {reason}; choose another --host or --port.")


def serve(settings: Settings, sock: socket.socket, source: Source) -> int:
    """Load the model and serve it until told to stop; the process's exit status.

    The first SIGTERM or SIGINT drains: no new requests, those under way finish within `shutdown_timeout`, and the
    status is 0. The second ends the process at once.

    Raises:
        AddressError: another process has taken the port since it was bound.
        SettingsError: the settings do not fit the model.
    """
    try:
        sock.listen(2048)
    except OSError as error:
        raise _address_error(settings.host, settings.port, error) from error
    return asyncio.run(_Serving(settings, sock, source).run())


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: it would close the port at once, and drains nothing of ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Serving:
    """One run of the server, from the bound socket to the exit status."""

    def __init__(self, settings: Settings, sock: socket.socket, source: Source) -> None:
        self._settings, self._sock, self._source = settings, sock, source
        self._availability = Availability()
        key = settings.api_key.get_secret_value() if settings.api_key is not None else None
        app = create_app(
            self._availability,
            max_body_bytes=int(settings.max_body_bytes),
            api_key=key,
            allowed_origins=settings.allowed_origins,
        )
        self._server = _Server(
            uvicorn.Config(
                app,
                log_config=None,
                lifespan="off",
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_LAST_BYTES_S,
            )
        )
        self._failure: BaseException | None = None
        self._signalled = False
        self._drain: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Serve until stopped; re-raises what went wrong while loading."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loader = threading.Thread(target=self._load, args=(loop,), name="exeunt-load", daemon=True)
        loader.start()
        await self._server.serve([self._sock])
        if self._drain is not None:
            await self._drain
        if self._failure is not None:
            raise self._failure
        if loader.is_alive():  # stopped while loading, which nothing can interrupt and nothing depends on
            _exit_now(0)
        service = self._availability.service
        if service is not None:
            await asyncio.to_thread(service.engine.stop)
        logger.info("Stopped.")
        return 0

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        """Load the model and open the service; on the loader's thread, so that probes are answered meanwhile."""
        began = time.monotonic()
        try:
            service = start_service(load_model(self._source, self._settings), self._settings)
        except BaseException as error:  # noqa: BLE001 - carried to the main thread, which ends the process with it
            self._failure = error
            loop.call_soon_threadsafe(self._stop_serving)
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: stopped while loading
            loop.call_soon_threadsafe(self._open, service, time.monotonic() - began)

    def _open(self, service: Service, seconds: float) -> None:
        self._availability.opens(service)
        if self._signalled:
            self._availability.drains()
            return
        host, port = self._sock.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        logger.info("Serving %s on http://%s:%d (loaded in %.1f s).", service.name, address, port, seconds)

    def _stop_serving(self) -> None:
        self._server.should_exit = True

    def _on_signal(self, number: int) -> None:
        if self._signalled:
            logger.warning("Second signal: stopping at once.")
            _exit_now(128 + number)
        self._signalled = True
        logger.info(
            "Draining: no new requests; up to %g s for those under way.", self._settings.shutdown_timeout
        )
        self._drain = asyncio.get_running_loop().create_task(self._drain_and_stop())

    async def _drain_and_stop(self) -> None:
        self._availability.drains()
        service = self._availability.service
        if service is not None:
            finished = await asyncio.to_thread(service.engine.drain, self._settings.shutdown_timeout)
            if not finished:
                logger.warning(
                    "Requests were still running after %g s; ending them.", self._settings.shutdown_timeout
                )
            await asyncio.to_thread(service.engine.stop)
        self._stop_serving()


def start_service(model: LoadedModel, settings: Settings) -> Service:
    """The loaded model behind a started engine, as the API needs it. Raises SettingsError."""
    offer = offer_of(model)
    _check_defaults(settings.default_compression, offer)
    config = engine_config(model, settings)
    name = settings.served_model_name or model.name
    stages = [str(stage) for stage in range(len(model.exits) + 1)]
    metrics = Metrics(new_registry(), name, stages, offer.exits, _targets(model))
    metrics.exit_thresholds(_default_thresholds(model, settings))
    engine = Engine(model, config, metrics)
    engine.start()
    return Service(
        name=name,
        model=model,
        engine=engine,
        config=config,
        metrics=metrics,
        offer=offer,
        defaults=settings.default_compression,
        created=int(time.time()),
        request_timeout_s=settings.request_timeout,
        max_body_bytes=int(settings.max_body_bytes),
    )


def _check_defaults(defaults: CompressionOptions, offer: Offer) -> None:
    try:
        resolve(defaults, CompressionOptions(), offer)
    except NotOfferedError as error:
        raise SettingsError(f"--default-compression: {error}") from error


def _targets(model: LoadedModel) -> list[float]:
    table = model.manifest.risk_table if model.manifest is not None else ()
    return sorted({line.target for entry in table for line in entry.targets})


def _default_thresholds(model: LoadedModel, settings: Settings) -> dict[float, float | None]:
    """The certified thresholds of the variant that requests get which ask for nothing."""
    certified = offer_of(model).certified(default_variant(model, settings), "propagate")
    return {target: certified.get(target) for target in _targets(model)}


def _exit_now(status: int) -> None:
    """End the process without waiting for its threads."""
    logging.shutdown()
    os._exit(status)
