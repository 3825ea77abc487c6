"""`POST /score`: the log-probabilities of a given text under a given compression."""

import time
from collections import Counter
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from exeunt.server.api.admission import admit, failure, score_request, text_field, timed_out
from exeunt.server.api.answers import applied, perplexity, score_depth
from exeunt.server.api.compression import AppliedCompression
from exeunt.server.api.errors import CLIENT_CLOSED_REQUEST, documented
from exeunt.server.api.generate import patience_s
from exeunt.server.api.inbox import Attendance, ClientGoneError, Inbox
from exeunt.server.api.json_route import EngineRoute
from exeunt.server.api.outcome import outcome_of
from exeunt.server.api.responses import ScoredTokenInfo, ScoreResponse, ScoreUsage
from exeunt.server.api.schemas import ScoreBody
from exeunt.server.api.service import Service, serving_service
from exeunt.server.request import Event, FailureEvent, ScoredToken, ScoreRequest

router = APIRouter(route_class=EngineRoute)

Outcome = list[ScoredToken] | Event


@router.post(
    "/score",
    summary="Score a text",
    response_model=ScoreResponse,
    responses=documented(400, 401, 408, 413, 415, 429, 500, 503, 504),
)
async def score(
    body: ScoreBody, http: Request, service: Annotated[Service, Depends(serving_service)]
) -> Response:
    """Log-probabilities of a text, token by token, each from the head at which it leaves.

    Every token of the text may leave under approximate exits; in `/generate` a prompt's tokens never do. In mode
    `verified` there is nothing to draft, for the text is given: it is scored at full depth, as with exits off.
    """
    outcome = outcome_of(http.scope)
    request = await score_request(body, service, http)
    inbox: Inbox[Outcome] = Inbox()
    admit(lambda: service.engine.score(request, inbox.put), service, request.variant, param=text_field(body))
    try:
        with Attendance(http.receive, inbox, patience_s(request.deadline)):
            tokens = await _outcome(inbox, service.request_timeout_s)
    except BaseException as error:
        service.engine.cancel(request.id)
        if not isinstance(error, ClientGoneError):
            raise
        outcome.client_left()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    response = _response(request, tokens, service, details=body.details).model_dump_json(exclude_unset=True)
    outcome.succeeded("scored")
    return Response(response, media_type="application/json")


async def _outcome(inbox: Inbox[Outcome], timeout_s: float) -> list[ScoredToken]:
    try:
        outcome = (await inbox.next())[0]
    except TimeoutError:
        raise timed_out(timeout_s) from None
    if isinstance(outcome, list):
        return outcome
    if isinstance(outcome, FailureEvent):
        raise failure(outcome, timeout_s)
    raise TypeError(f"the engine answered a score with {type(outcome).__name__}")


def _response(
    request: ScoreRequest, tokens: list[ScoredToken], service: Service, *, details: bool
) -> ScoreResponse:
    logprobs = [token.logprob for token in tokens if token.logprob is not None]
    by_exit = Counter(token.exit for token in tokens if token.exit is not None)
    total = sum(logprobs)
    fields: dict[str, object] = {
        "id": request.id,
        "model": service.name,
        "created": int(time.time()),
        "logprob": total,
        "perplexity": perplexity(-total, len(logprobs)),
        "usage": ScoreUsage(prompt_tokens=len(tokens), total_tokens=len(tokens)),
        "compression": applied(AppliedCompression(request.variant, request.exits)),
        "depth": score_depth(by_exit, service.model.spec.blocks),
    }
    if details:
        fields["tokens"] = [
            ScoredTokenInfo(id=t.id, text=t.text, logprob=t.logprob, depth=t.depth, exit=t.exit)
            for t in tokens
        ]
    return ScoreResponse.model_construct(_fields_set=set(fields), **fields)
