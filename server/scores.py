"""Texts being scored: begun, noted token by token, told or let go. All on the engine's thread."""

import logging
from collections.abc import Callable

from exeunt.server.answer import ScoreJob
from exeunt.server.detokenizer import TokenPieces
from exeunt.server.jobs import Jobs
from exeunt.server.pages import PagePool, PageTable
from exeunt.server.request import Event, FailureEvent, ScoredToken, ScoreRequest
from exeunt.server.row_result import RowResult
from exeunt.server.runner import Runner
from exeunt.server.scheduler import Scheduler
from exeunt.server.sequence import Sequence
from exeunt.server.stages import StagePlan

log = logging.getLogger("exeunt.engine")


class Scores:
    """Every text being scored, from its submission until its caller has its tokens' log-probabilities."""

    def __init__(
        self,
        plan: StagePlan,
        jobs: Jobs,
        scheduler: Scheduler,
        runner: Runner,
        pool: PagePool,
        pieces: TokenPieces,
    ) -> None:
        self._plan, self._jobs, self._scheduler = plan, jobs, scheduler
        self._runner, self._pool, self._pieces = runner, pool, pieces
        self._scoring: dict[Sequence, ScoreJob] = {}

    def __len__(self) -> int:
        return len(self._scoring)

    def job(self, sequence: Sequence) -> ScoreJob:
        """The request whose text this is."""
        return self._scoring[sequence]

    def new(self, request: ScoreRequest, on_done: Callable[[list[ScoredToken] | Event], None]) -> ScoreJob:
        """Take in a text; `on_done` gets its tokens, or a FailureEvent."""
        tokens = list(request.token_ids)
        table = PageTable(self._pool, self._runner.page_tokens(request.variant))
        sequence = Sequence(
            request.id, request.variant, request.exits, tokens, len(tokens), table, scoring=True
        )
        job = ScoreJob(request, on_done, sequence)
        self._jobs.add(job)
        self._scoring[sequence] = job
        return job

    def begin(self, job: ScoreJob) -> None:
        """Queue a text. One of one token is answered at once: there is nothing to predict."""
        self._scheduler.add(job.sequence)
        if len(job.request.token_ids) < 2:
            self.finish(job)

    def note(self, result: RowResult) -> None:
        """Keep the log-probabilities that a pass over a text yielded."""
        job = self._scoring[result.row.sequence]
        for score in result.scores:
            at = score.position + 1
            token_id = job.request.token_ids[at]
            depth, name = self._plan.stop(score.stage), self._plan.exit_name(score.stage)
            job.scores[at] = ScoredToken(token_id, self._pieces.of(token_id), score.logprob, depth, name)

    def finish(self, job: ScoreJob) -> None:
        """Tell the caller all tokens of its text, each with its log-probability (the first has none)."""
        tokens = job.request.token_ids
        first = [ScoredToken(tokens[0], self._pieces.of(tokens[0]), None, None, None)] if tokens else []
        self._end(job, first + [job.scores[at] for at in range(1, len(tokens))])

    def fail(self, job: ScoreJob, failure: FailureEvent) -> None:
        """Tell the caller that there will be no scores, and why."""
        self._end(job, failure)

    def _end(self, job: ScoreJob, outcome: list[ScoredToken] | Event) -> None:
        if not job.over:
            job.over = True
            try:
                job.on_done(outcome)
            except Exception:  # noqa: BLE001 - a caller that is gone is no trouble of the others
                log.warning("the caller of %s is gone", job.request.id)
        self._scheduler.remove(job.sequence)
        self._runner.leave(job.sequence)
        self._scoring.pop(job.sequence, None)
        self._jobs.close(job.request.id)
