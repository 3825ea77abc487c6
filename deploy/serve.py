"""`exeunt serve`: puts the pieces to work. Listens, makes the model ready, starts the engine, answers HTTP."""

import asyncio
import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Final

import uvicorn
import uvloop

from exeunt.calibration.progress import ProgressReport, TerminalProgress
from exeunt.compression.model import LoadedModel
from exeunt.deploy.expected_model import check_defaults, check_guarded, check_settings
from exeunt.deploy.http_connection import KEEP_ALIVE_S, Connection
from exeunt.deploy.loading import (
    Source,
    default_variant,
    engine_config,
    find_source,
    load_model,
)
from exeunt.deploy.logs import LoggedProgress
from exeunt.deploy.packaged import packaged_bundle
from exeunt.deploy.signals import CLEANING_UP_S, Interrupted, InterruptibleProgress, Interruption, handling
from exeunt.server.api.app import create_app
from exeunt.server.api.offer import offer_of
from exeunt.server.api.service import Availability, Service
from exeunt.server.engine import Engine
from exeunt.server.exit_guard import ExitGuard
from exeunt.server.metrics import Metrics, new_registry
from exeunt.server.settings import Settings

logger = logging.getLogger("exeunt.serve")

_LAST_BYTES_S: Final = 5  # seconds for answers that are complete to reach their clients
_LAST_WORDS_S: Final = 1.0  # for refusals of what is cut off then
_SIGNAL_CHECK_S: Final = 0.25
_IDLE_S: Final = 0.2  # in which a thread that has nothing to do ends
_BEGINS_ANEW: Final = " The packaged model's calibration begins anew with the next start."


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


def serve(settings: Settings, sock: socket.socket) -> int:
    """Listen, make the model ready, and serve it until told to stop; the process's exit status.

    From the start `/health` is answered; `/ready` is once the model is calibrated, where it must be, and loaded.
    The first SIGTERM or SIGINT drains: no new requests, those under way finish within `shutdown_timeout`, and the
    status is 0. While the model is being made ready it ends that work, with nothing half-made left. The second
    signal ends the process at once; but for CLEANING_UP_S after one that ended such work others are the same wish,
    so that impatience leaves nothing half-made either.

    Raises:
        AddressError: another process has taken the port since it was bound.
        SettingsError: the settings do not fit the machine or the model.
    """
    source = find_source(settings.model) if settings.model is not None else None
    check_settings(source, settings)  # what can be refused at once is, before anything listens
    try:
        sock.listen(2048)
    except OSError as error:
        raise _address_error(settings.host, settings.port, error) from error
    return _Serving(settings, sock, source).run()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: it would close the port at once, and drains nothing of ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Serving:
    """One run of the server, from the bound socket to the exit status.

    HTTP is answered on a thread of its own. The main thread, which alone is given signals, calibrates and loads, so
    that a signal ends that work where it stands; then it waits for the other.
    """

    def __init__(self, settings: Settings, sock: socket.socket, source: Source | None) -> None:
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
                http=Connection,
                ws="none",
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=_LAST_BYTES_S,
            )
        )
        self._loop = uvloop.new_event_loop()
        self._http = threading.Thread(target=self._answer, name="exeunt-http", daemon=True)
        self._http_failure: BaseException | None = None
        self._interruption = Interruption()
        self._preparing = False  # what a signal may interrupt is under way
        self._calibrating = False
        self._half_calibrated = False  # a calibration began and did not end
        self._signalled = False
        # by the monotonic clock: behind a calibration, which says itself how long it took
        self._loading_since = 0.0
        self._drain: asyncio.Task[None] | None = None

    def run(self) -> int:
        """Serve until stopped; raises what went wrong while calibrating, loading or answering."""
        with handling(self._on_signal):
            self._http.start()
            try:
                service = start_service(self._prepared(), self._settings)
                self._tell(self._open, service, time.monotonic() - self._loading_since)
            except BaseException as error:
                if not (isinstance(error, Interrupted) or self._told_to_stop):
                    self._tell(self._stop_serving)
                    self._http.join()
                    raise
                logger.debug("A signal ended the start.", exc_info=error)
                self._tell(self._begin_drain)
                self._http.join(CLEANING_UP_S)
                logger.info(
                    "Stopped before the model was ready.%s", _BEGINS_ANEW if self._half_calibrated else ""
                )
                return 0
            self._wait()
        if self._http_failure is not None:
            raise self._http_failure
        service.engine.stop()
        service.close()
        logger.info("Stopped.")
        if _others_at_work():
            _exit_now(0)
        return 0

    # -- the main thread --

    def _prepared(self) -> LoadedModel:
        """The model, calibrated before where that is to be done. Raises Interrupted by a signal."""
        try:
            self._preparing = True
            source = self._source or Source(str(self._packaged()), is_bundle=True)
            self._loading_since = time.monotonic()
            self._tell(self._availability.loads)
            model = load_model(source, self._settings)
        finally:
            self._preparing = False
        self._interruption.check()  # from here on a signal raises nothing
        return model

    def _packaged(self) -> Path:
        try:
            bundle = packaged_bundle(
                device=self._settings.device,
                progress=InterruptibleProgress(self._progress(), self._interruption),
                on_calibration=self._on_calibration,
                while_waiting=self._while_waiting,
            )
        finally:
            self._calibrating = False
        self._half_calibrated = False
        self._interruption.check()
        return bundle

    def _on_calibration(self) -> None:
        self._calibrating = self._half_calibrated = True
        self._interruption.check()
        self._tell(self._availability.calibrates)

    def _while_waiting(self) -> None:
        self._interruption.check()
        self._tell(self._availability.waits)

    def _progress(self) -> ProgressReport:
        """Bars for a person who looks on; log lines where the log goes to a file or a machine."""
        watched = sys.stderr.isatty() and not self._settings.log_json
        return TerminalProgress() if watched else LoggedProgress()

    def _wait(self) -> None:
        """Wait for the other thread, in short waits: a signal that comes just before one begins does not end it."""
        while self._http.is_alive():
            self._http.join(_SIGNAL_CHECK_S)

    @property
    def _told_to_stop(self) -> bool:
        return self._signalled or self._interruption.seen

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._interruption.cleaning_up:
            return
        if self._told_to_stop:
            logger.warning("Second signal: stopping at once.")
            _exit_now(128 + number)
        elif self._preparing:
            if not self._calibrating:  # nothing half-made is to be cleared away, and loading may take long
                _exit_later(CLEANING_UP_S, 0)
            self._interruption(number, frame)
        else:
            self._signalled = True
            logger.info(
                "Draining: no new requests; up to %g s for those under way.", self._settings.shutdown_timeout
            )
            self._tell(self._begin_drain)

    def _tell(self, call: Callable[..., None], *arguments: object) -> None:
        """Have the event loop call `call`, unless it has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *arguments)

    # -- the event loop's thread --

    def _answer(self) -> None:
        """Answer HTTP until told to stop."""
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._answered())
        except BaseException as error:  # noqa: BLE001 - carried to the main thread, which ends the process with it
            self._http_failure = error

    async def _answered(self) -> None:
        await self._server.serve([self._sock])
        state = self._server.server_state
        if state.tasks:  # cancelled by now: what they have to say is said
            await asyncio.wait(set(state.tasks), timeout=_LAST_WORDS_S)
        for connection in list(state.connections):  # and who does not read holds nobody up
            connection.transport.abort()
        if self._drain is not None:
            await self._drain

    def _open(self, service: Service, seconds: float) -> None:
        if self._told_to_stop or self._drain is not None:  # while the engine started
            return
        self._availability.opens(service)
        host, port = self._sock.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        logger.info("Serving %s on http://%s:%d (loaded in %.1f s).", service.name, address, port, seconds)

    def _stop_serving(self) -> None:
        self._server.should_exit = True

    def _begin_drain(self) -> None:
        if self._drain is None:
            self._drain = self._loop.create_task(self._drain_and_stop())

    async def _drain_and_stop(self) -> None:
        began = time.monotonic()
        self._availability.drains()
        service = self._availability.service
        if service is not None:
            finished = await asyncio.to_thread(service.engine.drain, self._settings.shutdown_timeout)
            if not finished:
                logger.warning(
                    "Requests were still running after %g s; ending them.", self._settings.shutdown_timeout
                )
            await self._texts_cut(service, began + self._settings.shutdown_timeout)
            await asyncio.to_thread(service.engine.stop)
        self._stop_serving()

    async def _texts_cut(self, service: Service, until: float) -> None:
        """Wait for whoever waits for the tokenizer, who is no request of the engine's."""
        while service.tokenizer.callers and time.monotonic() < until:
            await asyncio.sleep(_SIGNAL_CHECK_S)


def start_service(model: LoadedModel, settings: Settings) -> Service:
    """The loaded model behind a started engine, as the API needs it. Raises SettingsError."""
    offer = offer_of(model)
    check_defaults(settings.default_compression, offer)
    check_guarded(settings, offer)
    config = engine_config(model, settings)
    name = settings.served_model_name or model.name
    stages = [str(stage) for stage in range(len(model.exits) + 1)]
    metrics = Metrics(new_registry(), name, stages, offer.exits, _targets(model))
    thresholds = _default_thresholds(model, settings)
    metrics.exit_thresholds(thresholds)
    guard = ExitGuard(thresholds, metrics.exit_thresholds) if settings.exit_guard else None
    engine = Engine(model, config, metrics, guard=guard)
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


def _targets(model: LoadedModel) -> list[float]:
    table = model.manifest.risk_table if model.manifest is not None else ()
    return sorted({line.target for entry in table for line in entry.targets})


def _default_thresholds(model: LoadedModel, settings: Settings) -> dict[float, float | None]:
    """The certified thresholds of the variant that requests get which ask for nothing."""
    offer, variant = offer_of(model), default_variant(model.default_variant, settings)
    exits = settings.default_compression.early_exit
    asked = None if exits is None else exits.skipped_kv
    certified = offer.certified(variant, asked or offer.default_skipped_kv(variant))
    return {target: certified.get(target) for target in _targets(model)}


def _others_at_work() -> bool:
    """Whether threads go on that the interpreter would wait for: a text that is being cut cannot be stopped."""
    ours = [each for each in threading.enumerate() if each.name.startswith("exeunt-")]
    for each in ours:
        each.join(_IDLE_S)
    return any(each.is_alive() for each in ours)


def _exit_now(status: int) -> None:
    """End the process without waiting for its threads."""
    logging.shutdown()
    os._exit(status)


def _exit_later(seconds: float, status: int) -> None:
    """End the process in `seconds` if it has not ended by then."""
    timer = threading.Timer(seconds, _exit_now, (status,))
    timer.daemon = True
    timer.start()
