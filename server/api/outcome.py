"""How each request to generate or score ended: told to the metrics once, whoever knows first."""

import asyncio
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from exeunt.server.metrics import FailureReason, Metrics, RejectionReason, SuccessReason
from exeunt.server.request import FinishReason

COUNTED_ROUTES: Final = frozenset({"/generate", "/score"})
_KEY: Final = "exeunt.outcome"


class Outcome:
    """The end of one request. The first word counts; what goes wrong after it is no other end."""

    __slots__ = ("_metrics",)

    def __init__(self, metrics: Metrics | None) -> None:
        """Without metrics (another route, or the model still loads) nothing is counted."""
        self._metrics = metrics

    def succeeded(self, reason: SuccessReason) -> None:
        """It was answered, as far as `reason` says."""
        if metrics := self._take():
            metrics.succeeded(reason)

    def failed(self, reason: FailureReason) -> None:
        """It was let in and got no answer, or met a bug."""
        if metrics := self._take():
            metrics.failed(reason)

    def rejected(self, reason: RejectionReason) -> None:
        """It was not let in."""
        if metrics := self._take():
            metrics.rejected(reason)

    def client_left(self) -> None:
        """Nobody waits for its answer any more."""
        if metrics := self._take():
            metrics.succeeded(FinishReason.CANCELLED)
            metrics.client_disconnected()

    def _take(self) -> Metrics | None:
        metrics, self._metrics = self._metrics, None
        return metrics


class OutcomeCount:
    """Gives every request to generate or score its outcome, and sees to it that none ends uncounted."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in COUNTED_ROUTES:
            await self._app(scope, receive, send)
            return
        service = scope["app"].state.availability.service
        outcome = scope[_KEY] = Outcome(None if service is None else service.metrics)
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:  # the server ends without waiting for it
            outcome.failed("shutdown")
            raise
        finally:
            outcome.failed("internal")  # said by nobody until here: that is a bug


def outcome_of(scope: Scope) -> Outcome:
    """The outcome of a request; of one that is not counted, one that counts nothing."""
    found = scope.get(_KEY)
    return found if isinstance(found, Outcome) else Outcome(None)
