"""What an engine tells of its work; `exeunt.server.metrics` counts it for scrapes. No torch."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from exeunt.server.audit import AuditMetrics
from exeunt.server.block_account import WorkMetrics
from exeunt.server.request import EmittedToken, ExitMode, GenerationRequest, ScoreRequest


class EngineMetrics(AuditMetrics, WorkMetrics, Protocol):
    """What the engine calls, on its own thread: each method as `exeunt.server.metrics.Metrics` has it."""

    def step(self, stage: int, seconds: float, rows: int) -> None:
        """A stage was run once."""
        ...

    def token(self, mode: ExitMode, token: EmittedToken, blocks: int, since_last_s: float | None) -> None:
        """A token was emitted."""
        ...

    def started(self, queue_s: float, prompt_tokens: int) -> None:
        """A request left the queue."""
        ...

    def first_token(self, seconds: float) -> None:
        """A request's first token came."""
        ...

    def finished(self, tokens: int, total_s: float) -> None:
        """The last answer of a request is complete."""
        ...

    def compression_request(self, request: GenerationRequest | ScoreRequest) -> None:
        """A request with these savings was accepted."""
        ...

    def preempted(self) -> None:
        """A sequence lost its pages to another."""
        ...

    def gauges(
        self, running: int, waiting: int, rows_waiting: Sequence[int], kv_usage: Mapping[str, float]
    ) -> None:
        """What is true now."""
        ...

    def resident_bytes(self, sizes: Mapping[str, int]) -> None:
        """The bytes held by kind."""
        ...


class Uncounted:
    """Hears everything and counts nothing: an engine's metrics where `prometheus_client` is not installed."""

    def step(self, stage: int, seconds: float, rows: int) -> None: ...

    def token(self, mode: ExitMode, token: EmittedToken, blocks: int, since_last_s: float | None) -> None: ...

    def work(self, *, executed: int = 0, skipped: int = 0, wasted: int = 0, passes: int = 0) -> None: ...

    def drafts(self, proposed: int, accepted: int) -> None: ...

    def audit(self, agreed: bool, kl: float, nll_full: float, nll_exit: float) -> None: ...

    def started(self, queue_s: float, prompt_tokens: int) -> None: ...

    def first_token(self, seconds: float) -> None: ...

    def finished(self, tokens: int, total_s: float) -> None: ...

    def compression_request(self, request: GenerationRequest | ScoreRequest) -> None: ...

    def preempted(self) -> None: ...

    def gauges(
        self, running: int, waiting: int, rows_waiting: Sequence[int], kv_usage: Mapping[str, float]
    ) -> None: ...

    def resident_bytes(self, sizes: Mapping[str, int]) -> None: ...
