"""Runs ticks, whole on a CPU or a GPU or by stages, samples, audits, begins the next.

It knows nothing of queues or of requests' lives: the scheduler says which rows run how far, the engine what follows.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch import Tensor

from exeunt.compression.kv_format import KVPages
from exeunt.compression.model import LoadedModel
from exeunt.compression.row_graphs import StepGraphs
from exeunt.compression.variant import Variant
from exeunt.server.auditor import Auditor
from exeunt.server.device_passes import DevicePasses
from exeunt.server.held_states import HeldStates
from exeunt.server.request import SamplingParams
from exeunt.server.row import Row
from exeunt.server.row_result import RowResult
from exeunt.server.row_sampling import RowSampling
from exeunt.server.sampling import finished_draws, start_each
from exeunt.server.seen_tokens import SeenTokens
from exeunt.server.sequence import Sequence
from exeunt.server.staged_passes import StagedPasses
from exeunt.server.stages import StagePlan
from exeunt.server.tick import Tick
from exeunt.server.tick_batch import (
    Part,
    TickBatch,
    placed,
)
from exeunt.server.tick_run import Piece, StageRun, Successor, TickRun, Undrawn
from exeunt.server.whole_passes import WholePass, WholePasses
from exeunt.server.whole_run import pieces

log = logging.getLogger("exeunt.engine")


_NOTHING_SEEN: Final = np.empty(0, np.int32)


def _nothing() -> None:
    """What there is to be done while the device works, where there is nothing."""


def _unknown(_: Tick) -> None:
    """The successor of a tick where nobody says."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """What the runner needs to draw a sequence's next token."""

    params: SamplingParams
    choice: int
    seen: SeenTokens = field(default_factory=SeenTokens)


class Runner:
    """Runs ticks on one device. Holds the page arena and the states of tokens that wait in front of a stage.

    `on_stages` is told of every run of stages.
    """

    def __init__(
        self,
        model: LoadedModel,
        plan: StagePlan,
        arena: Tensor,
        page_bytes: int,
        on_stages: Callable[[StageRun], None],
        audit_share: float = 0.0,
        graphs: StepGraphs | None = None,
    ) -> None:
        """`graphs` are those that the model's decoders run in, where they do."""
        self._graphs = graphs
        self._model = model
        self._on_stages = on_stages
        self._plan = plan
        self._device = model.device
        self._pages = {v: KVPages(model.kv_layout(v, page_bytes), arena) for v in model.variants}
        self._samplers: dict[Sequence, Sampler] = {}
        self._held = HeldStates()
        self._auditor = Auditor(audit_share, model.device, lambda: self.captured_seconds)
        self._whole = WholePasses(model, plan, self._sampling)
        self._staged = StagedPasses(
            model, plan, self._pages, self._held, self._auditor, self._clock, lambda: self.captured_seconds
        )
        self._on_device = DevicePasses(model, plan, self._pages, self._held, self._auditor)
        self._audited = 0.0  # seconds that audits took beside the last piece
        self._ahead: TickRun | None = None  # begun before its turn
        self._goes_ahead = True

    def page_tokens(self, variant: Variant) -> int:
        """Tokens that one page holds in this variant's layout."""
        return self._pages[variant].layout.page_tokens

    @property
    def captured_seconds(self) -> float:
        """Seconds that the capturing of CUDA graphs has taken so far: no part of what a tick costs."""
        return 0.0 if self._graphs is None else self._graphs.pool.seconds

    @property
    def has_graphs(self) -> bool:
        """Whether passes are replayed: the host is free then while the device works."""
        return self._graphs is not None

    @property
    def goes_ahead(self) -> bool:
        """Whether a tick is begun before its turn where it is known: beside graphs, until one has failed."""
        return self.has_graphs and self._goes_ahead

    @property
    def has_device_passes(self) -> bool:
        """Whether ticks that ask exits of the approximate mode are one graph: the device decides who leaves."""
        return self.has_graphs and self._on_device.any_exits

    @property
    def holds_nothing(self) -> bool:
        """Whether no sequence is known and no state is kept."""
        kept = self._samplers or self._held or self._ahead is not None
        return not kept and self._auditor.holds_nothing

    def enter(self, sequence: Sequence, sampler: Sampler) -> None:
        """Remember how a sequence's tokens are drawn."""
        self._samplers[sequence] = sampler

    def forget_states(self, sequence: Sequence) -> None:
        """Drop the states of a preempted sequence."""
        self._held.forget(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Forget a finished sequence."""
        self.forget_states(sequence)
        self._samplers.pop(sequence, None)
        self._auditor.forget(sequence)
        ahead = self.ahead
        if ahead is not None and not any(row.sequence in self._samplers for row in ahead.rows):
            # nobody is left to hear of it; whatever takes its memory or pages is behind it on the device's one queue
            self._ahead = None

    @property
    def ahead(self) -> Tick | None:
        """The tick that was begun before its turn: the next to `run`. None where there is none."""
        return None if self._ahead is None else self._ahead.tick

    def is_ahead(self, sequence: Sequence) -> bool:
        """Whether a pass of a sequence was begun before its turn."""
        return self._ahead is not None and any(row.sequence is sequence for row in self._ahead.tick.rows)

    def run(
        self, tick: Tick, meanwhile: Callable[[], None] = _nothing, successor: Successor = _unknown
    ) -> list[RowResult]:
        """Run a tick's stages for its rows and say what became of each, in order. Stand in inference mode.

        `meanwhile` is called where the device has work and the host none, if that comes. Where `successor` knows which
        tick follows, that is begun as soon as the device knows this one's tokens: it is `ahead` then, and must be the
        next to be run.

        Tokens that leave at an exit on the way get their deeper keys and values there and drop out of the batch, or
        wait in front of the next stage for a pass that goes on; what is left after the tick's last stage, where that is
        not the model's last, waits there too.
        """
        run, self._ahead = self._ahead, None
        self._auditor.begin_tick()
        if run is None or run.tick is not tick:
            run = TickRun(tick, self._clock())
            self._pass_stages(run)
            self._start_draws(run)
        self._ahead = ahead = self._begun_ahead(run, successor)
        meanwhile()
        run.take_draws()
        self._note_audits(run)
        if run.draws is None:
            self._wait()
        ended = self._end_piece(run)
        if ahead is not None:
            # what audits waited for was this one's doing, most of it, where they began behind its launch
            ahead.began = max(ahead.began, ended - self._audited)
        return [run.results[row] for row in tick.rows]

    def _pass_stages(self, run: TickRun) -> None:
        """Run a tick's stages, one piece after the other; the last is not waited for."""
        whole = self._whole.of(run.tick, self._pages[run.tick.variant])
        if whole is not None:
            self._pass_whole(run, whole)
            return
        if self.has_device_passes and self._on_device.takes(run.tick) and self._on_device.run(run):
            return
        self._staged.run(run, lambda: self._end_piece(run))

    def _pass_whole(self, run: TickRun, whole: WholePass) -> None:
        """Run a tick in one call: it does what the stages, one after the other, would.

        What the call took is known by stage, and the rest of the tick surrounds it: no piece is under way.
        """
        passed = whole.run(whole.states(self._held))
        found = whole.went(passed)
        with_logits = found.settle(run.results, self._held)
        if with_logits:
            run.undrawn.append(Undrawn(with_logits, passed.logits))
            if passed.drawn is not None:
                run.draws = finished_draws(*passed.drawn)
        for piece, seconds in pieces(self._plan, passed):
            self._tell(piece.ended(run.tick.variant, seconds))
        found.audit(self._auditor, self._model.decoder(run.tick.variant), self._pages[run.tick.variant])

    def _end_piece(self, run: TickRun) -> float:
        """Tell of the stages that ran up to now, if any did; returns the time."""
        ended = self._clock()
        self._audited = self._auditor.take_seconds()
        if run.piece is not None:
            self._tell(run.ended_piece(ended, self._audited))
        return ended

    def _tell(self, runs: list[StageRun]) -> None:
        for each in runs:
            self._on_stages(each)

    def _begun_ahead(self, run: TickRun, successor: Successor) -> TickRun | None:
        """The tick that follows, begun before this one's tokens are on the host; None where that cannot be."""
        if not self._goes_ahead or run.draws is None or run.draws.ids is None:
            return None
        tick = successor(run.tick)
        if tick is None:
            return None
        ahead = TickRun(tick, self._clock())
        try:
            return ahead if self._begin(ahead, run, run.draws.ids) else None
        except Exception:
            self._goes_ahead = False  # whose trouble it is shows when the tick has its turn
            log.warning("no step is begun before its turn any more: the last such failed", exc_info=True)
            rows = {row.sequence: row for row in run.tick.rows}
            for row, result in ahead.results.items():
                run.results[rows[row.sequence]].blocks_beside += result.pairs
            return None

    def _begin(self, ahead: TickRun, run: TickRun, drawn: Tensor) -> bool:
        """Run a tick of decode steps up to its draws, each behind a token that the tick `run` has `drawn` [rows].

        False where a row may leave at an exit and the device cannot decide it: nothing is begun then.
        """
        places = {row.sequence: place for place, row in enumerate(run.drawn_rows)}
        order = [places[row.sequence] for row in ahead.tick.rows]
        if any(row.threshold is not None for row in ahead.tick.rows):
            if not (self._on_device.takes(ahead.tick) and self._on_device.run(ahead, drawn, order)):
                return False
        else:
            parts = [Part(row, row.positions) for row in ahead.entering.pop(0)]
            geometry, index = placed(parts, self._device, order)
            embed = self._model.decoder(ahead.tick.variant).embed
            hidden = embed(drawn.index_select(0, index).long(), geometry.positions)
            ahead.piece = Piece(range(self._plan.stages), len(parts), len(parts))
            self._staged.run_stages(ahead, TickBatch(parts, geometry, hidden), 0, self._plan.last)
        self._start_draws(ahead)
        return True

    def device_answers(self) -> bool:
        """Whether the device still does anything: after some errors a GPU refuses every later call of the process."""
        try:
            self._wait()
        except RuntimeError:
            return False
        return True

    def _wait(self) -> None:
        """Wait for a GPU: a tick that draws nothing, a prompt's chunk, would be timed by its launches alone."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _clock(self) -> float:
        """Seconds, on a clock that stands still while graphs are captured."""
        return time.perf_counter() - self.captured_seconds

    def _start_draws(self, run: TickRun) -> None:
        """Sample the next tokens of all rows that left in this tick, wherever they did, in one go."""
        if not run.undrawn or run.draws is not None:
            return
        parts = [some.logits for some in run.undrawn]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        tokens = [token for some in run.undrawn for token in some.tokens]
        asks = [self._sampling(row.sequence, position) for row, position, _ in tokens]
        beside = None if run.pending_exits is None else run.pending_exits.left_at
        run.draws = start_each(logits, asks, self._model.spec.eos_token_ids, self._graphs, beside)

    def _note_audits(self, run: TickRun) -> None:
        """Finish the audits for which all logits are there, now that their tokens are drawn."""

        def emitted(row: Row, position: int) -> int | None:
            known = row.sequence.tokens[position + 1 : position + 2]
            draws = [d for d in run.results[row].draws if d.position == position and d.error is None]
            found = [*known, *(draw.token for draw in draws)]
            return found[0] if found else None

        outcome = self._auditor.end_tick(emitted)
        for row, audit in outcome.found:
            run.results[row].audits.append(audit)
        for row, blocks in outcome.blocks:
            run.results[row].blocks_beside += blocks

    def _sampling(self, sequence: Sequence, position: int) -> RowSampling:
        """How the token behind `position` is drawn: from the history up to there, drafts included."""
        sampler, tokens = self._samplers[sequence], sequence.tokens
        if sampler.params.repetition_penalty == 1.0:
            history = _NOTHING_SEEN
        else:
            history = sampler.seen.up_to(tokens, position + 1, sequence.confirmed)
        return RowSampling(sampler.params, sampler.choice, position + 1 - sequence.prompt_tokens, history)
