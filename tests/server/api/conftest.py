"""A real HTTP server in front of a scripted engine: the API without the cost of a model."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import httpx
import pytest
import uvicorn
import uvloop

from exeunt.compression.variant import Variant
from exeunt.server.api.app import create_app
from exeunt.server.api.offer import Certificate, Offer
from exeunt.server.api.schemas import CompressionOptions
from exeunt.server.api.service import Availability, Service
from exeunt.server.audit import AuditTotals
from exeunt.server.engine_config import EngineConfig
from exeunt.server.exit_guard import ExitGuard
from exeunt.server.metrics import Metrics, new_registry
from exeunt.server.request import (
    AnswerSummary,
    DepthTotals,
    EmittedToken,
    Event,
    ExitPolicy,
    FailureEvent,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    ScoredToken,
    ScoreRequest,
    StepEvent,
)

BLOCKS = 4
VOCABULARY = 300
INT4 = Variant(weights="int4", kv_cache="int4")
FULL = Variant()


class ByteTokenizer:
    """Token id = byte."""

    special_tokens_map: ClassVar = {"eos_token": "<eos>"}
    chat_template = None

    def __len__(self) -> int:
        return VOCABULARY

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        if text == "beyond":
            return [VOCABULARY]
        return ([299] if add_special_tokens else []) + list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"<{i}>" for i in ids]


@dataclass
class ScriptedEngine:
    """Answers every request with the letters a, b, c, ...; every other token leaves after block 0.

    `refuse` is raised at submission. While `gate` is not set, an answer stops after its first `before_gate` tokens.
    """

    alive: bool = True
    refuse: Exception | None = None
    fail_at: int | None = None
    failure: FailureEvent = field(default_factory=lambda: FailureEvent("It broke.", "internal", "err-1"))
    before_gate: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    cancelled: list[str] = field(default_factory=list)
    requests: list[GenerationRequest | ScoreRequest] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    guard: ExitGuard = field(default_factory=lambda: ExitGuard({}, lambda _: None))
    held: dict[str, int] = field(default_factory=lambda: {"int4": 1000, "full": 500})
    audit_totals: AuditTotals = field(default_factory=AuditTotals)

    def __post_init__(self) -> None:
        self.gate.set()

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.requests.append(request)
        threading.Thread(target=self._answer, args=(request, on_event), daemon=True).start()

    def score(self, request: ScoreRequest, on_done: Callable[[list[ScoredToken] | Event], None]) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.requests.append(request)
        if self.fail_at is not None:
            on_done(self.failure)
            return
        exits = ["block_0", "final"]
        rest = [
            ScoredToken(t, chr(t), -0.5, BLOCKS if i % 2 else 1, exits[i % 2])
            for i, t in enumerate(request.token_ids[1:])
        ]
        on_done([ScoredToken(request.token_ids[0], "", None, None, None), *rest])

    def guarded(self, exits: ExitPolicy) -> ExitPolicy:
        return self.guard.applied(exits)

    def capacity(self, variant: Variant) -> int:
        return self.held[variant.kv_cache]

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self.gone.set()

    def _answer(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> None:
        for index in range(request.sampling.max_new_tokens):
            if index == self.before_gate:
                self.gate.wait(10)
            if index == self.fail_at:
                on_event(self.failure)
                return
            for choice in range(request.n):
                on_event(StepEvent(choice, letter(index), (token(index),)))
        for choice in range(request.n):
            on_event(FinishEvent(choice, "", summary(request.sampling.max_new_tokens)))


def error_of(response: httpx.Response) -> dict[str, Any]:
    """What an error response says, which has the one shape."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"].endswith(".")
    error: dict[str, Any] = body["error"]
    return error


def letter(index: int) -> str:
    return chr(ord("a") + index % 26)


def token(index: int) -> EmittedToken:
    depth, name = (1, "block_0") if index % 2 else (BLOCKS, "final")
    return EmittedToken(ord(letter(index)), letter(index), -0.5, depth, name)


def summary(tokens: int) -> AnswerSummary:
    early = tokens // 2
    executed = early + (tokens - early) * BLOCKS
    totals = DepthTotals(
        blocks=BLOCKS,
        by_exit={"final": tokens - early, "block_0": early},
        blocks_executed=executed,
        blocks_skipped=tokens * BLOCKS - executed,
        block_passes=executed,
    )
    return AnswerSummary(FinishReason.LENGTH, tokens, totals, 0.5 * tokens, 0.001, 0.002, 0.01)


def offer() -> Offer:
    certificates = {
        (INT4, "propagate"): (Certificate(0.01, None), Certificate(0.05, 0.9), Certificate(0.1, 0.8)),
        (FULL, "propagate"): (Certificate(0.01, 0.99),),
    }
    modes = ("off", "verified", "approximate")
    nll = {(INT4, "propagate"): (Certificate(0.01, None, "only 3 tokens left"), Certificate(0.05, 0.86))}
    exits = ("block_0", "block_2")
    return Offer((FULL, INT4), INT4, exits, cast(Any, modes), cast(Any, certificates), cast(Any, nll))


def make_service(engine: ScriptedEngine, **changes: Any) -> Service:
    spec = SimpleNamespace(
        vocab_size=VOCABULARY,
        blocks=BLOCKS,
        family="llama",
        hidden_size=8,
        parameters=1000,
        eos_token_ids=(299,),
    )
    model = SimpleNamespace(
        tokenizer=ByteTokenizer(), spec=spec, manifest=None, device="cpu", dtype="torch.float32"
    )
    fields: dict[str, Any] = {
        "name": "tiny",
        "model": model,
        "engine": engine,
        "config": EngineConfig(max_model_len=100, max_num_seqs=8, max_num_queued_reqs=3),
        "metrics": Metrics(new_registry(), "tiny", ["0", "1"], ["block_0", "block_2"], [0.01]),
        "offer": offer(),
        "defaults": CompressionOptions(),
        "created": 1_700_000_000,
        "request_timeout_s": 60.0,
        "max_body_bytes": 2000,
        **changes,
    }
    return Service(**fields)


@contextmanager
def listening(availability: Availability, **options: Any) -> Iterator[httpx.Client]:
    """The application on a free port and a client for it."""
    app = create_app(availability, **{"max_body_bytes": 2000, **options})
    with socket.create_server(("127.0.0.1", 0)) as sock:
        config = uvicorn.Config(app, log_config=None, lifespan="off", http="h11", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: uvloop.run(server.serve([sock])), daemon=True)
        thread.start()
        deadline = time.monotonic() + 10
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.005)
        with httpx.Client(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", timeout=20) as client:
            yield client
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="session")
def _server() -> Iterator[tuple[Availability, httpx.Client]]:
    availability = Availability()
    with listening(availability) as client:
        yield availability, client


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def reopen(_server: tuple[Availability, httpx.Client], engine: ScriptedEngine) -> Callable[..., Availability]:
    """Serve anew, with fresh metrics and some of the service's fields changed."""

    def opened(**changes: Any) -> Availability:
        _server[0].opens(make_service(engine, **changes))
        return _server[0]

    return opened


@pytest.fixture
def client(_server: tuple[Availability, httpx.Client], reopen: Callable[..., Availability]) -> httpx.Client:
    reopen()
    return _server[1]


@pytest.fixture
def serve(engine: ScriptedEngine) -> Callable[..., AbstractContextManager[httpx.Client]]:
    """A server of its own with other options of the application; `ready` False: its model still loads."""

    def served(*, ready: bool = True, **options: Any) -> AbstractContextManager[httpx.Client]:
        availability = Availability()
        if ready:
            availability.opens(make_service(engine))
        return listening(availability, **options)

    return served


@pytest.fixture
def counted(_server: tuple[Availability, httpx.Client]) -> Callable[..., float]:
    """The value of one series of the metrics that the server exports."""

    def value(name: str, **labels: str) -> float:
        service = _server[0].service
        assert service is not None
        found = service.metrics.registry.get_sample_value(f"exeunt_{name}", {"model_name": "tiny", **labels})
        assert found is not None, f"no series {name} {labels}"
        return found

    return value
