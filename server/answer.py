"""One answer in the making: what a sequence has yielded, timed, counted and turned into text."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from exeunt.server.block_account import BlockAccount
from exeunt.server.detokenizer import StreamDetokenizer
from exeunt.server.request import (
    AnswerSummary,
    EmittedToken,
    Event,
    FinishReason,
    GenerationRequest,
    ScoredToken,
    ScoreRequest,
)
from exeunt.server.sequence import Sequence


@dataclass(slots=True, eq=False)
class Answer:
    """One choice of a request while it is generated. Times are seconds on the `time.monotonic` clock."""

    owner: "Job"
    sequence: Sequence
    choice: int
    detokenizer: StreamDetokenizer
    account: BlockAccount
    nll: float = 0.0
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    def summary(self, reason: FinishReason) -> AnswerSummary:
        """The totals of the answer as it stands now."""
        now, arrival = time.monotonic(), self.owner.request.arrival
        return AnswerSummary(
            finish_reason=reason,
            completion_tokens=self.sequence.generated,
            depth=self.sequence.totals,
            nll=self.nll,
            queue_s=(self.started if self.started is not None else now) - arrival,
            time_to_first_token_s=None if self.first_token is None else self.first_token - arrival,
            total_s=now - arrival,
        )

    def count(self, token: EmittedToken) -> None:
        """Add an emitted token to the totals."""
        totals = self.sequence.totals
        totals.by_exit[token.exit] = totals.by_exit.get(token.exit, 0) + 1
        self.nll -= token.logprob

    def finish_reason(
        self, token_id: int, eos_token_ids: tuple[int, ...], max_model_len: int
    ) -> FinishReason | None:
        """Whether the token just added ends the answer, and why."""
        sampling = self.owner.request.sampling
        if self.detokenizer.stopped:
            return FinishReason.STOP
        enough = self.sequence.generated >= sampling.min_new_tokens
        if token_id in eos_token_ids and not sampling.ignore_eos and enough:
            return FinishReason.STOP
        if self.sequence.generated >= sampling.max_new_tokens or len(self.sequence.tokens) >= max_model_len:
            return FinishReason.LENGTH
        return None


@dataclass(slots=True, eq=False)
class Job:
    """A generation request under way and whom to tell."""

    request: GenerationRequest
    on_event: Callable[[Event], None]
    answers: list[Answer] = field(default_factory=list)
    running: int = 0  # answers not finished
    spoken: bool = False  # its first token is out
    started: bool = False  # it has left the queue
    over: bool = False  # its last event is out


@dataclass(slots=True, eq=False)
class ScoreJob:
    """A text being scored and whom to tell."""

    request: ScoreRequest
    on_done: Callable[[list[ScoredToken] | Event], None]
    sequence: Sequence
    scores: dict[int, ScoredToken] = field(default_factory=dict)  # by position of the scored token
    started: bool = False  # it has left the queue
    over: bool = False  # its last event is out
