"""`POST /generate`: a prompt goes to the engine, its answer comes back whole or as a stream of events."""

import time
from collections.abc import AsyncIterator
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from exeunt.server.api.admission import admit, failure, generation_request, timed_out
from exeunt.server.api.answers import (
    GatheredAnswer,
    applied,
    depth_info,
    perplexity,
    timing,
    token_info,
    usage,
)
from exeunt.server.api.compression import AppliedCompression
from exeunt.server.api.errors import (
    CLIENT_CLOSED_REQUEST,
    ApiError,
    count_error,
    documented,
    internal_error,
    log_bug,
)
from exeunt.server.api.inbox import Attendance, ClientGoneError, Inbox
from exeunt.server.api.json_route import EngineRoute
from exeunt.server.api.outcome import Outcome, outcome_of
from exeunt.server.api.responses import Choice, GenerateResponse
from exeunt.server.api.schemas import GenerateBody
from exeunt.server.api.service import Service, serving_service
from exeunt.server.api.streaming import DONE, EventStreamResponse, event_bytes, plain_event_bytes
from exeunt.server.request import (
    AnswerSummary,
    Event,
    FailureEvent,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    StepEvent,
)

router = APIRouter(route_class=EngineRoute)

GRACE_S: Final = (
    10.0  # the engine ends a request at its deadline; past this it is stuck, and the client is told
)
_GRAVEST_FIRST: Final = (
    FinishReason.TIMEOUT,
    FinishReason.CANCELLED,
    FinishReason.LENGTH,
    FinishReason.STOP,
)


def patience_s(deadline: float | None) -> float | None:
    """For how many seconds an answer is waited for, its engine's grace included; None: without end."""
    return None if deadline is None else max(0.0, deadline - time.monotonic()) + GRACE_S


class LiveGeneration:
    """One request while the engine works on it and its client waits."""

    def __init__(
        self, request: GenerationRequest, body: GenerateBody, service: Service, outcome: Outcome
    ) -> None:
        self.request, self.body, self.service, self.outcome = request, body, service, outcome
        self.created = int(time.time())
        self.answers = [GatheredAnswer() for _ in range(request.n)]
        self._failed: FailureEvent | None = None
        self._inbox: Inbox[Event] = Inbox(
            wakes=lambda event: body.stream or not isinstance(event, StepEvent),
        )

    def submit(self) -> None:
        """Queue the request; raises ApiError 400, 429 or 503."""
        admit(
            lambda: self.service.engine.submit(self.request, self._inbox.put),
            self.service,
            self.request.variant,
            param="max_new_tokens",
        )

    def attend(self, http: Request) -> Attendance:
        """Notice from now on when the client leaves, or the time is over."""
        return Attendance(http.receive, self._inbox, patience_s(self.request.deadline))

    @property
    def finished(self) -> bool:
        return all(answer.summary is not None for answer in self.answers)

    @property
    def finish_reason(self) -> FinishReason:
        """Why the request ended: the gravest of its answers' reasons."""
        reasons = {answer.summary.finish_reason for answer in self.answers if answer.summary is not None}
        return next(reason for reason in _GRAVEST_FIRST if reason in reasons)

    async def events(self) -> list[StepEvent | FinishEvent]:
        """What the engine says next, gathered into the answers too; raises ApiError where the request failed.

        A failure is raised only when what came before it has been returned.
        """
        if self._failed is not None:
            raise failure(self._failed, self.service.request_timeout_s)
        events: list[StepEvent | FinishEvent] = []
        for event in await self._next():
            if isinstance(event, FailureEvent):
                self._failed = event
                break
            self.answers[event.choice].add(event)
            events.append(event)
        return events or await self.events()

    async def _next(self) -> list[Event]:
        try:
            return await self._inbox.next()
        except TimeoutError:
            raise timed_out(self.service.request_timeout_s) from None

    def close(self) -> None:
        """Stop what still runs."""
        if not self.finished:
            self.service.engine.cancel(self.request.id)

    def response(self, *, summary_only: bool = False) -> GenerateResponse:
        """The finished answer; `summary_only` leaves out texts and tokens, which a stream has sent already."""
        summaries = [answer.summary for answer in self.answers if answer.summary is not None]
        fields: dict[str, object] = {
            "id": self.request.id,
            "model": self.service.name,
            "created": self.created,
            "usage": usage(len(self.request.prompt_token_ids), summaries),
            "compression": applied(AppliedCompression(self.request.variant, self.request.exits)),
            "timing": timing(summaries),
        }
        per_answer = [
            self._answer_fields(answer, summary, summary_only)
            for answer, summary in zip(self.answers, summaries, strict=True)
        ]
        if len(per_answer) == 1:
            fields |= per_answer[0]
        else:
            fields["choices"] = [
                Choice.model_construct(_fields_set={"index", *choice}, index=index, **choice)
                for index, choice in enumerate(per_answer)
            ]
        return GenerateResponse.model_construct(_fields_set=set(fields), **fields)

    def _answer_fields(
        self, answer: GatheredAnswer, summary: AnswerSummary, summary_only: bool
    ) -> dict[str, object]:
        fields: dict[str, object] = {
            "finish_reason": summary.finish_reason,
            "depth": depth_info(summary.depth),
            "perplexity": perplexity(summary.nll, summary.completion_tokens),
        }
        if not summary_only:
            fields["text"] = answer.text
            if self.body.details:
                fields["tokens"] = [token_info(token) for token in answer.tokens]
        return fields

    def step(self, event: StepEvent | FinishEvent) -> bytes:
        """The stream's event for new text and tokens; empty where there is nothing to say."""
        if isinstance(event, FinishEvent) and not event.text:
            return b""
        fields: dict[str, object] = {"id": self.request.id, "index": event.choice, "text": event.text}
        if self.body.details:
            tokens = event.tokens if isinstance(event, StepEvent) else ()
            fields["tokens"] = [token._asdict() for token in tokens]
        return plain_event_bytes(fields)


@router.post(
    "/generate",
    summary="Continue a prompt",
    response_model=GenerateResponse,
    responses={
        **documented(400, 401, 408, 413, 415, 429, 500, 503, 504),
        200: {
            "description": "The answer; with `stream` true server-sent events: one `data:` object per step with "
            "the new `text` and `tokens`, a last one with the summary fields, then `data: [DONE]`.",
        },
    },
)
async def generate(
    body: GenerateBody, http: Request, service: Annotated[Service, Depends(serving_service)]
) -> Response:
    """Generate from a prompt. Every saving is chosen per request; every token says at which depth it left.

    A stream tells only what stays: in mode `verified` a token is sent once the full model has confirmed it.
    """
    outcome = outcome_of(http.scope)
    live = LiveGeneration(await generation_request(body, service, http), body, service, outcome)
    live.submit()
    attendance = live.attend(http)
    try:
        first = await live.events()
        if body.stream:
            return _stream(live, first, attendance)
        while not live.finished:
            await live.events()
        response = live.response().model_dump_json(exclude_unset=True)
    except BaseException as error:
        attendance.end()
        live.close()
        if not isinstance(error, ClientGoneError):
            raise
        outcome.client_left()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    attendance.end()
    outcome.succeeded(live.finish_reason)
    return Response(response, media_type="application/json")


def _stream(
    live: LiveGeneration, first: list[StepEvent | FinishEvent], attendance: Attendance
) -> EventStreamResponse:
    def end() -> None:
        attendance.end()
        live.close()

    return EventStreamResponse(_stream_events(live, first), on_end=end)


async def _stream_events(live: LiveGeneration, first: list[StepEvent | FinishEvent]) -> AsyncIterator[bytes]:
    events = first
    try:
        while True:
            if steps := b"".join(map(live.step, events)):
                yield steps
            if live.finished:
                break
            events = await live.events()
        summary = event_bytes(live.response(summary_only=True))
    except ClientGoneError:
        live.outcome.client_left()
        raise
    except Exception as error:  # noqa: BLE001 -- the status is sent; what is left is to say so in the stream
        problem = error if isinstance(error, ApiError) else internal_error(log_bug(error, "POST /generate"))
        count_error(live.outcome, problem)
        yield event_bytes(problem.body)
        yield DONE
        return
    live.outcome.succeeded(live.finish_reason)
    yield summary
    yield DONE
