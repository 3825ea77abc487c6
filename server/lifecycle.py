"""Requests' lives: begun, run tick by tick, finished, cancelled, timed out or failed. All on the engine's thread."""

import copy
import logging
import time
import uuid
from collections.abc import Callable
from typing import Literal

from exeunt.compression.graph_pool import TOKENS
from exeunt.compression.model import LoadedModel
from exeunt.server.answer import Answer, Job, ScoreJob
from exeunt.server.audit import AuditBook
from exeunt.server.block_account import BlockAccount
from exeunt.server.detokenizer import StreamDetokenizer, TokenPieces
from exeunt.server.drafting import Drafter
from exeunt.server.engine_config import EngineConfig
from exeunt.server.engine_metrics import EngineMetrics
from exeunt.server.gauges import Gauges
from exeunt.server.jobs import Jobs
from exeunt.server.pages import PagePool, PageTable
from exeunt.server.request import (
    Event,
    FailureEvent,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    ScoredToken,
    ScoreRequest,
)
from exeunt.server.row_result import RowResult
from exeunt.server.runner import Runner, Sampler
from exeunt.server.scheduler import Scheduler
from exeunt.server.scores import Scores
from exeunt.server.sequence import Sequence, Status
from exeunt.server.stages import StagePlan
from exeunt.server.teller import Teller
from exeunt.server.tick import Tick
from exeunt.server.tolerant_drafter import TolerantDrafter
from exeunt.server.verification import Draw, confirmed_draws

log = logging.getLogger("exeunt.engine")


class DeviceLostError(RuntimeError):
    """The device fails every call: no request can be served by this process any more."""


class Lifecycle:
    """Every request between its submission and its last event, and what it holds meanwhile.

    `on_started` is called when a request leaves the queue (however), `on_ended` when it is over.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        metrics: EngineMetrics,
        plan: StagePlan,
        scheduler: Scheduler,
        runner: Runner,
        pool: PagePool,
        *,
        new_drafter: Callable[[GenerationRequest], Drafter],
        on_started: Callable[[], None],
        on_ended: Callable[[], None],
        audits: AuditBook,
    ) -> None:
        self._model, self._config, self._metrics = model, config, metrics
        self._plan, self._scheduler, self._runner, self._pool = plan, scheduler, runner, pool
        self._new_drafter, self._audits = new_drafter, audits
        # a tokenizer is not safe to share, and the API's threads use the model's
        self._tokenizer = copy.deepcopy(model.tokenizer)
        self._pieces = TokenPieces(self._tokenizer)
        self._jobs = Jobs(on_started, on_ended)
        self._answers: dict[Sequence, Answer] = {}
        self._scores = Scores(plan, self._jobs, scheduler, runner, pool, self._pieces)
        self._gauges = Gauges(model, metrics, self._jobs, scheduler, pool)
        # beside graphs the host has nothing to do; without, it launches operation by operation
        eos, beside = model.spec.eos_token_ids, runner.has_graphs
        self._teller = Teller(self._pieces, metrics, plan, eos, keeps_back=beside)

    @property
    def holds_nothing(self) -> bool:
        """Whether no request is under way and nothing of one is kept."""
        return (
            not (self._jobs or self._answers or self._scores or self._pool.used)
            and self._teller.owes_nothing
            and self._runner.holds_nothing
        )

    @property
    def under_way(self) -> bool:
        """Whether a request is between its submission and its end."""
        return bool(self._jobs)

    def next_deadline(self) -> float | None:
        """When the next request times out, on the `time.monotonic` clock."""
        return self._jobs.next_deadline()

    def begin(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> None:
        """Queue a request's answers."""
        job = Job(request, on_event)
        self._jobs.add(job)
        try:
            self._add_answers(job)
            self._metrics.compression_request(request)
        except Exception as error:  # noqa: BLE001 - a bug met by one request is no trouble of the others
            self._fail(job, error)

    def _add_answers(self, job: Job) -> None:
        request = job.request
        for choice in range(request.n):
            sequence = self._sequence(request, choice)
            detokenizer = StreamDetokenizer(self._tokenizer, request.sampling.stop, request.prompt_token_ids)
            account = BlockAccount(sequence.totals, self._metrics)
            answer = Answer(job, sequence, choice, detokenizer, account)
            job.answers.append(answer)
            job.running += 1
            self._answers[sequence] = answer
            self._runner.enter(sequence, Sampler(request.sampling, choice))
            self._scheduler.add(sequence)

    def begin_score(
        self, request: ScoreRequest, on_done: Callable[[list[ScoredToken] | Event], None]
    ) -> None:
        """Queue a text to be scored; `on_done` gets its tokens, or a FailureEvent."""
        job = self._scores.new(request, on_done)
        try:
            self._scores.begin(job)
            self._metrics.compression_request(request)
        except Exception as error:  # noqa: BLE001 - as for a request to generate
            self._fail(job, error)

    def _sequence(self, request: GenerationRequest, choice: int) -> Sequence:
        sampling, tokens = request.sampling, list(request.prompt_token_ids)
        name = f"{request.id}/{choice}"
        table = PageTable(self._pool, self._runner.page_tokens(request.variant))
        sequence = Sequence(name, request.variant, request.exits, tokens, len(tokens), table)
        sequence.totals.blocks = self._plan.blocks
        sequence.limit = min(len(tokens) + sampling.max_new_tokens, self._config.max_model_len)
        sequence.ends = frozenset() if sampling.ignore_eos else frozenset(self._model.spec.eos_token_ids)
        sequence.foreseeable = self._foreseeable(sequence, sampling)
        if request.exits.mode == "verified":
            drafter = self._new_drafter(request)
            sequence.drafter = TolerantDrafter(drafter, name, self._model.spec.vocab_size)
        return sequence

    def _foreseeable(self, sequence: Sequence, sampling: SamplingParams) -> bool:
        """Whether its next step can be put together before the host knows the token in front, or where that left.

        In the verified mode that is so of a step that drafts nothing.
        """
        if sampling.repetition_penalty != 1.0:
            return False
        through = self._config.scheduling == "run-through" and self._runner.has_device_passes
        return sequence.exits.mode != "approximate" or (sequence.replays_exits and through)

    def note_scheduling(self) -> None:
        """Tell the metrics what the scheduler has just admitted and preempted."""
        for sequence in self._scheduler.take_admitted():
            if sequence.scoring:
                self._jobs.starts(self._scores.job(sequence))
                continue
            answer, now = self._answers[sequence], time.monotonic()
            if answer.started is None:
                answer.started = now
            request = answer.owner.request
            if self._jobs.starts(answer.owner):
                self._metrics.started(now - request.arrival, len(request.prompt_token_ids))
        for sequence in self._scheduler.take_preempted():
            self._runner.forget_states(sequence)
            if sequence in self._answers:
                self._answers[sequence].account.settle()
            self._metrics.preempted()

    def next_tick(self) -> Tick | None:
        """The tick to run now: the one that was begun ahead, or what the scheduler says; None when nothing is ready."""
        tick = self._runner.ahead
        if tick is None:
            return self._scheduler.next_tick(ahead=self._goes_ahead)
        self._scheduler.resume(tick)
        return tick

    def run(self, tick: Tick) -> None:
        """Run a tick and carry out what it comes to. A row that fails takes its own request with it, no other."""
        if tick.tokens > TOKENS[-1]:  # launched operation by operation: that takes the host long
            self._teller.flush()
        began = time.perf_counter() - self._runner.captured_seconds
        try:
            results = self._runner.run(tick, self._teller.flush, self._successor)
        except Exception as error:  # whatever a tick raises fails its own requests alone
            self._fail_tick(tick, error)
            self._end_troubled()
            if not self._runner.device_answers():
                raise DeviceLostError("the GPU answers no more, start the server again") from error
            return
        ended = time.perf_counter() - self._runner.captured_seconds  # nobody is served by a capture
        self._scheduler.served(tick.variant, ended - began)
        for result in results:
            if result.row.sequence.status is Status.RUNNING:
                self._apply_or_fail(result)
        self._end_troubled()

    def _successor(self, tick: Tick) -> Tick | None:
        """The tick that follows one that runs: asked for only where the device works while the host goes on."""
        return self._scheduler.tick_ahead(tick) if self._goes_ahead else None

    @property
    def _goes_ahead(self) -> bool:
        """Whether steps may be begun before their turn."""
        return self._config.async_scheduling and self._runner.goes_ahead

    def tell(self) -> None:
        """Tell callers and metrics all that is known: due where no tick follows."""
        self._teller.flush()
        self._end_troubled()

    def _end_troubled(self) -> None:
        """End the requests of callers that are gone, and of those whose tokens could not be told."""
        gone, broken = self._teller.gone, self._teller.broken
        while gone:
            self._cancel(gone.pop().request.id, FinishReason.CANCELLED)
        while broken:
            job, error = next(iter(broken.items()))
            if not job.over:
                self._fail(job, error)
            del broken[job]

    def _apply_or_fail(self, result: RowResult) -> None:
        owner = self._owner(result.row.sequence)
        try:
            self._apply(result)
        except Exception as error:  # noqa: BLE001 - a bug met by one row is no trouble of the others
            self._fail(owner, error)

    def _apply(self, result: RowResult) -> None:
        row, sequence = result.row, result.row.sequence
        if sequence.scoring:
            self._scores.note(result)
        else:
            answer, ended = self._answers[sequence], result.waits_at is None
            for draw in result.draws:
                ended = ended and draw.error is None
            answer.account.ran(sequence, result.pairs, result.passes, stop=row.stop, ended=ended)
            answer.account.beside(result.blocks_beside)
            for audit in result.audits:
                self._audits.note(sequence.exits, audit)
        if result.waits_at is None:
            sequence.computed = row.stop
        if result.draws:
            self._take_draws(answer, result)
        if sequence.status is not Status.RUNNING:
            return
        if result.waits_at is not None:
            self._scheduler.move_on(row, result.waits_at)
        elif sequence.scoring and not sequence.prefilling:
            self._scores.finish(self._scores.job(sequence))
        else:
            self._scheduler.finish_pass(sequence)

    def _take_draws(self, answer: Answer, result: RowResult) -> None:
        """Tokens were drawn: at an exit of the verified mode they are drafts, else they settle what is certain."""
        sequence, draws = answer.sequence, result.draws
        if sequence.exits.mode != "verified":
            for draw in draws:
                if draw.error is None:
                    answer.account.yielded()
                self._emit(answer, draw)
        elif draws[0].error is not None:
            self._fail(answer.owner, RuntimeError(draws[0].error))
        elif draws[0].stage != self._plan.last:
            sequence.tokens.append(draws[0].token)
            sequence.drafts.append(draws[0].stage)
        else:
            self._verify(answer, draws, result.row.stop)

    def _verify(self, answer: Answer, draws: tuple[Draw, ...], stop: int) -> None:
        """The full model has spoken about the drafts: emit what is certain and drop the rest."""
        sequence = answer.sequence
        certain, accepted = confirmed_draws(sequence.tokens[sequence.confirmed :], sequence.drafts, draws)
        if sequence.drafter is not None:
            sequence.drafter.settled(tuple(sequence.drafts), accepted)
        if sequence.drafts:
            answer.account.judged(len(sequence.drafts), accepted)
        sequence.reject_drafts(0)
        for draw in certain:
            if draw.error is None:
                answer.account.confirm()
            self._emit(answer, draw)
            if sequence.status is not Status.RUNNING:
                return
        answer.account.settle()
        sequence.computed = min(stop, len(sequence.tokens) - 1)
        sequence.table.truncate(len(sequence.tokens))

    def _emit(self, answer: Answer, draw: Draw) -> None:
        """A new token: record where it left, tell the caller, and see whether the answer ends here."""
        if draw.error is not None:
            self._fail(answer.owner, RuntimeError(draw.error))
            return
        sequence = answer.sequence
        sequence.tokens.append(draw.token)
        sequence.left_at.append(draw.stage)
        answer.account.emitted(sequence, self._plan.stop(draw.stage))
        self._teller.token(answer, draw)
        reason = answer.finish_reason(draw.token, self._model.spec.eos_token_ids, self._config.max_model_len)
        if reason is not None:
            self._finish(answer, reason)

    def _finish(self, answer: Answer, reason: FinishReason) -> None:
        job = answer.owner
        self._teller.flush()  # its last token among them
        if job in self._teller.broken:  # it fails as soon as all results of the tick are through
            return
        text = answer.detokenizer.finish()
        self._close_account(answer)
        self._release(answer)
        summary = answer.summary(reason)
        job.running -= 1
        if job.running == 0:
            tokens = sum(other.sequence.generated for other in job.answers)
            self._metrics.finished(tokens, summary.total_s)
        job.over = job.running == 0
        self._teller.tell(job, FinishEvent(answer.choice, text, summary))
        if job.over:
            self._jobs.close(job.request.id)

    def _close_account(self, answer: Answer) -> None:
        """Count what an answer that ends has cost, a step that was begun and is not needed any more included."""
        if self._runner.is_ahead(answer.sequence):
            answer.account.beside(self._plan.blocks)
        answer.account.close(answer.sequence.generated)

    def _release(self, answer: Answer) -> None:
        if answer.sequence.status is not Status.FINISHED:
            self._scheduler.remove(answer.sequence)
        self._runner.leave(answer.sequence)
        self._answers.pop(answer.sequence, None)

    def cancel(self, request_id: str, reason: FinishReason) -> None:
        """End a request as it stands: its answers finish with `reason`, a text being scored fails."""
        self._cancel(request_id, reason)
        self._end_troubled()

    def _cancel(self, request_id: str, reason: FinishReason) -> None:
        job = self._jobs.get(request_id)
        if job is None or job.over:
            return
        try:
            self._cut_short(job, reason)
        except Exception as error:  # noqa: BLE001 - a bug met by one request is no trouble of the others
            self._fail(job, error)

    def _cut_short(self, job: Job | ScoreJob, reason: FinishReason) -> None:
        kind: Literal["timeout", "cancelled"] = "timeout" if reason is FinishReason.TIMEOUT else "cancelled"
        if isinstance(job, ScoreJob):
            self._scores.fail(job, FailureEvent(f"The request was {_ENDED[reason]}.", kind))
            return
        if reason is FinishReason.TIMEOUT and not job.spoken:
            self._let_go(job, FailureEvent("The request timed out before its first token.", "timeout"))
            return
        for answer in list(job.answers):
            if answer.sequence.status is not Status.FINISHED:
                self._finish(answer, reason)

    def _let_go(self, job: Job | ScoreJob, failure: FailureEvent) -> None:
        """End a request with a failure: tell its caller, whatever else may go wrong, and free what it holds."""
        self._teller.flush()
        if isinstance(job, ScoreJob):
            self._scores.fail(job, failure)
            return
        self._close_books(job)
        if not job.over:
            job.over = True
            self._teller.tell(job, failure)
        try:
            for answer in job.answers:
                self._release(answer)
        finally:
            self._jobs.close(job.request.id)

    def _close_books(self, job: Job) -> None:
        """Count what a failed request has cost."""
        try:
            for answer in job.answers:
                if answer.sequence.status is not Status.FINISHED:
                    self._close_account(answer)
        except Exception as error:
            log.error("what request %s has cost is not counted in full", job.request.id, exc_info=error)

    def _fail(self, job: Job | ScoreJob, error: BaseException) -> None:
        """A bug met this request: log it under an id and tell the caller that id."""
        error_id = uuid.uuid4().hex[:12]
        log.error("request %s failed (error id %s)", job.request.id, error_id, exc_info=error)
        self._let_go(job, FailureEvent("The request failed inside the server.", "internal", error_id))

    def _fail_tick(self, tick: Tick, error: Exception) -> None:
        for row in tick.rows:
            if row.sequence.status is Status.RUNNING:
                self._fail(self._owner(row.sequence), error)

    def _owner(self, sequence: Sequence) -> Job | ScoreJob:
        return self._scores.job(sequence) if sequence.scoring else self._answers[sequence].owner

    def expire(self) -> None:
        """End the requests whose time is over."""
        for request_id in self._jobs.expired(time.monotonic()):
            self.cancel(request_id, FinishReason.TIMEOUT)

    def abandon(self, failure: FailureEvent) -> None:
        """Fail every request under way, and hold nothing any more."""
        for job in self._jobs:
            try:
                self._let_go(job, failure)
            except Exception as error:
                log.error("request %s could not be let go", job.request.id, exc_info=error)

    def set_gauges(self, *, force: bool) -> None:
        """Export what is running and held now; without `force` only where that was done some time ago."""
        self._gauges.set(force=force)


_ENDED = {FinishReason.TIMEOUT: "timed out", FinishReason.CANCELLED: "cancelled"}
