"""Tells callers of new tokens: at once, or while the device works, for telling takes as long as a small step."""

import logging
import time
from collections.abc import Callable
from functools import partial

from exeunt.server.answer import Answer, Job
from exeunt.server.detokenizer import TokenPieces
from exeunt.server.engine_metrics import EngineMetrics
from exeunt.server.request import EmittedToken, Event, StepEvent
from exeunt.server.stages import StagePlan
from exeunt.server.verification import Draw

log = logging.getLogger("exeunt.engine")


class Teller:
    """What callers and metrics hear of tokens, in order.

    Whom telling meets trouble with is noted, and nothing else is changed that a running tick reads: `gone` are jobs
    whose caller is not there any more, `broken` those of which a token could not be told, and why. Of a broken job
    nothing more is told. Whoever runs ticks ends these jobs.
    """

    def __init__(
        self,
        pieces: TokenPieces,
        metrics: EngineMetrics,
        plan: StagePlan,
        eos_token_ids: tuple[int, ...],
        *,
        keeps_back: bool,
    ) -> None:
        """`keeps_back` where something works beside the host; else all is told at once."""
        self._pieces, self._metrics, self._plan = pieces, metrics, plan
        self._eos_token_ids, self._keeps_back = eos_token_ids, keeps_back
        self._owed: list[Callable[[], None]] = []
        self.gone: list[Job] = []
        self.broken: dict[Job, Exception] = {}

    @property
    def owes_nothing(self) -> bool:
        """Whether all is told and no job is in trouble."""
        return not (self._owed or self.gone or self.broken)

    def token(self, answer: Answer, draw: Draw) -> None:
        """A token was drawn: tell of it now, or by the next `flush`.

        An answer's first is waited for, and where text may end the answer it is needed now.
        """
        now, before = time.monotonic(), answer.last_token
        answer.last_token = now
        since_last = None if before is None else now - before
        if self._keeps_back and before is not None and not answer.detokenizer.may_stop:
            self._owed.append(partial(self._say, answer, draw, now, since_last))
        else:
            self._say(answer, draw, now, since_last)

    def flush(self) -> None:
        """Tell all that is owed. A tick may be running."""
        if self._owed:
            owed, self._owed = self._owed, []
            for say in owed:
                say()

    def tell(self, job: Job, event: Event) -> None:
        """Tell the caller of an event; one that is gone is noted, and hears no more."""
        try:
            job.on_event(event)
        except Exception:  # noqa: BLE001 - a caller that is gone is no trouble of the others
            log.warning("the caller of %s is gone; its request is cancelled", job.request.id)
            job.on_event = _ignore
            if not job.over:  # else it has ended, and this was its last event
                self.gone.append(job)

    def _say(self, answer: Answer, draw: Draw, now: float, since_last: float | None) -> None:
        """Tell the caller and the metrics of a token that was drawn at `now`."""
        job = answer.owner
        if job.over or job in self.broken:
            return
        try:
            depth, name = self._plan.stop(draw.stage), self._plan.exit_name(draw.stage)
            token = EmittedToken(draw.token, self._pieces.of(draw.token), draw.logprob, depth, name)
            answer.count(token)
            self._metrics.token(job.request.exits.mode, token, self._plan.blocks, since_last)
            if answer.first_token is None:
                answer.first_token = now
                if not job.spoken:
                    job.spoken = True
                    self._metrics.first_token(now - job.request.arrival)
            self.tell(job, StepEvent(answer.choice, self._text_of(answer, draw.token), (token,)))
        except Exception as error:  # noqa: BLE001 - a bug met by one row is no trouble of the others
            self.broken[job] = error

    def _text_of(self, answer: Answer, token_id: int) -> str:
        """The text a token adds; an end-of-text token adds none."""
        if token_id in self._eos_token_ids and not answer.owner.request.sampling.ignore_eos:
            return ""
        return answer.detokenizer.push(token_id)


def _ignore(_: Event) -> None:
    """Where the events of a caller that is gone go."""
