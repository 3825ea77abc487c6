"""The engine's face and thread: requests come in from any thread, one thread runs them all."""

import contextlib
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import torch

from exeunt.compression.kv_format import page_bytes_for
from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.server.audit import AuditBook, AuditTotals
from exeunt.server.drafters import AdaptiveDrafters
from exeunt.server.drafting import Drafter
from exeunt.server.engine_config import EngineConfig
from exeunt.server.engine_metrics import EngineMetrics
from exeunt.server.exit_guard import ExitGuard
from exeunt.server.lifecycle import Lifecycle
from exeunt.server.pages import PagePool
from exeunt.server.request import (
    Event,
    ExitPolicy,
    FailureEvent,
    FinishReason,
    GenerationRequest,
    ScoredToken,
    ScoreRequest,
)
from exeunt.server.runner import Runner
from exeunt.server.scheduler import Scheduler
from exeunt.server.stage_costs import DraftCosts, StageCosts
from exeunt.server.stages import StagePlan
from exeunt.server.tick import Tick
from exeunt.server.tick_run import StageRun

log = logging.getLogger("exeunt.engine")


class QueueFullError(Exception):
    """As many requests wait as the server lets wait."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"{limit} request{' is' if limit == 1 else 's are'} waiting, the limit; try again later or raise "
            "--max-num-queued-reqs."
        )
        self.limit = limit


class EngineStoppedError(Exception):
    """The engine takes no more requests: it is draining or stopped."""


class RequestTooLargeError(Exception):
    """A request needs more KV memory than there is in all."""

    def __init__(self, tokens: int, most: int) -> None:
        super().__init__(
            f"The request takes room for {tokens} tokens and the KV cache holds {most} in its format; "
            "ask for fewer tokens or raise --kv-cache-memory."
        )
        self.tokens, self.most = tokens, most


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """What the engine holds at this moment."""

    running: int  # sequences
    waiting: int  # sequences
    kv_pages_free: int
    kv_pages_total: int
    page_bytes: int


Command = Callable[[], None]


class Engine:
    """Runs requests through one loaded model. `submit`, `cancel` and `score` may be called from any thread.

    Callbacks come on the engine's own thread, in order, and must return at once.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        metrics: EngineMetrics,
        *,
        new_drafter: Callable[[GenerationRequest], Drafter] | None = None,
        guard: ExitGuard | None = None,
        on_stages: Callable[[StageRun], None] | None = None,
    ) -> None:
        """`new_drafter` makes what decides on drafts for one answer of a request in the verified mode, None: what pays.
        `guard` hears of every audit and has its say on thresholds, None: they stay as calibrated. `on_stages` hears of
        every run of stages.
        """
        self._config, self._metrics = config, metrics
        self.plan = StagePlan(
            model.spec.blocks,
            tuple(head.block for head in model.exits),
            certified=model.certified_exits,
            drafting=model.drafting_exit,
        )
        self._page_bytes = page_bytes_for(model.spec, model.dtype)
        self._pool = PagePool(max(config.kv_cache_bytes // self._page_bytes, 1))
        self._costs = StageCosts()
        self._stage_seconds = 0.0  # of the tick under way
        self._on_stages = on_stages
        self._scheduler = self._new_scheduler()
        self._model = model
        self._runner = self._new_runner(model)
        self._guard = guard
        self._audits = AuditBook(metrics, None if guard is None else guard.observe)
        self._drafters = AdaptiveDrafters(self.plan, self._costs)
        self._lives = Lifecycle(
            model,
            config,
            metrics,
            self.plan,
            self._scheduler,
            self._runner,
            self._pool,
            new_drafter=new_drafter or self._drafters.new,
            on_started=self._unqueue,
            on_ended=self._close,
            audits=self._audits,
        )
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="exeunt-engine", daemon=True)
        self._lock = threading.Lock()
        self._queued = 0  # requests submitted whose first sequence has not started; guarded by the lock
        self._open = 0  # requests accepted and not ended; guarded by the lock
        self._accepting = True
        self._stopping = False
        self._failed = False

    def _new_scheduler(self) -> Scheduler:
        config = self._config
        return Scheduler(
            self.plan,
            self._pool,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            policy=config.scheduling,
            costs=self._costs,
            longest_wait=config.longest_wait_s,
            max_owed=config.max_owed,
        )

    def _new_runner(self, model: LoadedModel) -> Runner:
        model.release_graphs()  # an earlier engine's, which hold its pages
        arena = torch.zeros(self._pool.num_pages * self._page_bytes, dtype=torch.uint8, device=model.device)
        graphs = model.capture(self._config.max_model_len) if self._config.cuda_graphs else None
        share = self._config.audit_share
        return Runner(model, self.plan, arena, self._page_bytes, self._note_stages, share, graphs)

    # -- any thread --

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def capacity(self, variant: Variant) -> int:
        """Tokens of one sequence that the whole KV cache could hold in this variant's format."""
        return self._pool.num_pages * self._runner.page_tokens(variant)

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> None:
        """Queue a request; events follow on `on_event` until every choice has finished or the request failed.

        Raises:
            QueueFullError: as many requests wait as may.
            EngineStoppedError: the engine drains or has stopped.
            RequestTooLargeError: it could never fit the KV cache.
        """
        tokens = len(request.prompt_token_ids) + request.sampling.max_new_tokens
        self._check_capacity(min(tokens, self._config.max_model_len), request.variant)
        self._accept(lambda: self._lives.begin(request, on_event))

    def score(self, request: ScoreRequest, on_done: Callable[[list[ScoredToken] | Event], None]) -> None:
        """Queue a text to be scored; `on_done` gets its tokens, or a FailureEvent. Raises as `submit` does."""
        self._check_capacity(len(request.token_ids), request.variant)
        self._accept(lambda: self._lives.begin_score(request, on_done))

    def cancel(self, request_id: str) -> None:
        """Stop a request; what it holds is freed. Unknown or finished ids are no error: the race is natural."""
        self._commands.put(lambda: self._lives.cancel(request_id, FinishReason.CANCELLED))

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs: false before `start`, after `stop`, and after a bug ended it."""
        return self._thread.is_alive() and not self._failed

    def snapshot(self) -> EngineSnapshot:
        """What the engine holds now; figures of one moment only when the engine is idle."""
        return EngineSnapshot(
            running=self._scheduler.running,
            waiting=self._scheduler.waiting,
            kv_pages_free=self._pool.free,
            kv_pages_total=self._pool.num_pages,
            page_bytes=self._page_bytes,
        )

    def guarded(self, exits: ExitPolicy) -> ExitPolicy:
        """The policy to admit a request with that asked for this one: the guard may have raised its threshold."""
        return exits if self._guard is None else self._guard.applied(exits)

    @property
    def audit_totals(self) -> AuditTotals:
        """Sums over all audits so far."""
        return self._audits.totals

    def draft_costs(self, variant: Variant) -> DraftCosts:
        """What drafting costs at present, by what was seen of this variant; for reports, and exact when idle."""
        return self._drafters.costs(variant)

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait until those taken are finished; False if some were left at the time-out."""
        with self._lock:
            self._accepting = False
        deadline = time.monotonic() + timeout_s
        while not self._is_idle():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
        return True

    def stop(self) -> None:
        """End the engine's thread; requests still under way fail with kind "shutdown"."""
        with self._lock:
            self._accepting = False
        if self._thread.is_alive():
            self._commands.put(self._shut_down)
            self._thread.join()
        self._runner.device_answers()  # a step that was begun ahead may run still, in graphs
        self._model.release_graphs()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or running; False at the time-out."""
        deadline = time.monotonic() + timeout_s
        while not self._is_idle():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.002)
        return True

    def check_integrity(self) -> None:
        """Raise unless nothing is held while nothing runs (pages, states, requests): for tests and idle moments."""
        self._pool.check_integrity([s.table for s in self._scheduler.running_sequences()])
        if not self._lives.under_way and not self._lives.holds_nothing:
            raise RuntimeError(
                f"the engine is idle and still holds {self._pool.used} pages or a request's state"
            )

    def _is_idle(self) -> bool:
        with self._lock:
            return self._open == 0

    def _check_capacity(self, tokens: int, variant: Variant) -> None:
        most = self.capacity(variant)
        if tokens > most:
            raise RequestTooLargeError(tokens, most)

    def _accept(self, begin: Command) -> None:
        with (
            self._lock
        ):  # held until the command is queued: whoever stops the engine finds all it has accepted
            if not self._accepting:
                raise EngineStoppedError("The engine is stopping and takes no more requests.")
            if self._queued >= self._config.max_num_queued_reqs:
                raise QueueFullError(self._config.max_num_queued_reqs)
            self._queued += 1
            self._open += 1
            self._commands.put(begin)

    def _unqueue(self) -> None:
        with self._lock:
            self._queued -= 1

    def _close(self) -> None:
        with self._lock:
            self._open -= 1

    # -- the engine's thread --

    def _note_stages(self, run: StageRun) -> None:
        """Tell the metrics and the costs of a run of stages. Those run in one piece share its time by their blocks."""
        blocks = self.plan.stop(run.stages[-1]) - self.plan.start(run.stages[0])
        for stage in run.stages:
            share = (self.plan.stop(stage) - self.plan.start(stage)) / blocks
            self._metrics.step(stage, run.seconds * share, run.rows)
            self._costs.ran(
                run.variant, stage, run.tokens, (run.seconds - run.gate_seconds) * share, run.rows
            )
        if run.gated:
            self._costs.asked(run.variant, run.stages[-1], run.gated, run.gate_seconds)
        self._stage_seconds += run.seconds
        if self._on_stages is not None:
            self._on_stages(run)

    def _note_tick(self, tick: Tick, seconds: float, *, plain: bool, ahead: bool) -> None:
        """Tell the costs of a tick; it was begun `ahead` or not, and was a `plain` step (see `Tick`) or not."""
        if not ahead:  # else its stages began before this turn
            self._costs.ticked(len(tick.rows), seconds - self._stage_seconds)
        if plain and ahead == (self._runner.ahead is not None):  # else it began or ended a row of such steps
            self._costs.stepped(tick.variant, len(tick.rows), seconds, ahead=ahead)

    def _clock(self) -> float:
        """Seconds, on a clock that stands still while CUDA graphs are captured."""
        return time.perf_counter() - self._runner.captured_seconds

    @torch.inference_mode()  # entered once: at every tick it takes a fiftieth of a small step
    def _loop(self) -> None:
        if self._model.device.index is not None:
            torch.cuda.set_device(self._model.device)  # each thread has its own: kernels launch there
        try:
            while not self._stopping:
                self._take_commands()
                began, self._stage_seconds = self._clock(), 0.0
                self._lives.expire()
                ahead = self._runner.ahead is not None
                tick = self._lives.next_tick()
                self._lives.note_scheduling()
                if tick is not None:
                    plain = self._runner.has_graphs and tick.plain
                    self._lives.run(tick)
                    self._note_tick(tick, self._clock() - began, plain=plain, ahead=ahead)
                    self._drafters.ticked()
                else:
                    self._lives.tell()
                self._lives.set_gauges(force=tick is None)
        except Exception as error:  # noqa: BLE001 - callers must hear of it, or they wait for ever
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """A bug outside a tick: nothing can be trusted any more, so everybody is told and nobody let in."""
        error_id = uuid.uuid4().hex[:12]
        log.critical("the engine has stopped on a bug (error id %s)", error_id, exc_info=error)
        with self._lock:
            self._accepting, self._failed = False, True
        self._begin_accepted()
        self._lives.abandon(FailureEvent("The engine has stopped on a bug.", "internal", error_id))

    def _begin_accepted(self) -> None:
        """Begin what was accepted and not begun, so that its callers can be told like the others."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()

    def _take_commands(self) -> None:
        """Carry out what other threads asked for; with nothing to run, wait for it."""
        while not self._stopping:
            busy = self._scheduler.running or self._scheduler.waiting
            if busy and self._commands.empty():
                return
            if not busy:
                self._lives.set_gauges(force=True)  # what is exported while nothing happens must be true
            try:
                command = self._commands.get(block=not busy, timeout=self._patience())
            except queue.Empty:
                return
            command()

    def _patience(self) -> float | None:
        """How long the engine may sleep: until the next deadline, or for ever."""
        deadline = self._lives.next_deadline()
        return None if deadline is None else max(deadline - time.monotonic(), 0.0)

    def _shut_down(self) -> None:
        self._stopping = True
        self._begin_accepted()
        self._lives.abandon(FailureEvent("The server has shut down.", "shutdown"))
