"""Turns a tick into tensors, runs its stages, asks the gates, samples.

It knows nothing of queues or of requests' lives: the scheduler says which rows run how far, the engine what follows.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.compression.host_memory import staged
from exeunt.compression.kv_format import KVPages
from exeunt.compression.model import LoadedModel
from exeunt.compression.row_graphs import StepGraphs
from exeunt.compression.variant import Variant
from exeunt.server.auditor import Auditor
from exeunt.server.gate_timer import GateTimer
from exeunt.server.held_states import HeldStates
from exeunt.server.request import SamplingParams
from exeunt.server.row import Row
from exeunt.server.row_result import RowResult, Score
from exeunt.server.sampling import RowSampling, start_each, told_draws
from exeunt.server.sequence import Sequence
from exeunt.server.stages import StagePlan
from exeunt.server.tick import Tick
from exeunt.server.tick_batch import (
    Part,
    TickBatch,
    geometry_of,
    integers,
    of_tokens,
    placed,
    selected,
    without,
)
from exeunt.server.tick_run import Piece, StageRun, Successor, TickRun, Undrawn
from exeunt.server.whole_passes import WholePass, WholePasses

log = logging.getLogger("exeunt.engine")


def _nothing() -> None:
    """What there is to be done while the device works, where there is nothing."""


def _unknown(_: Tick) -> None:
    """The successor of a tick where nobody says."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """What the runner needs to draw a sequence's next token."""

    params: SamplingParams
    choice: int


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
            ahead.began = ended
        return [run.results[row] for row in tick.rows]

    def _pass_stages(self, run: TickRun) -> None:
        """Run a tick's stages, one piece after the other; the last is not waited for."""
        whole = self._whole.of(run.tick, self._pages[run.tick.variant])
        if whole is not None:
            self._pass_whole(run, whole)
            return
        batch: TickBatch | None = None
        stage = run.tick.first_stage
        while batch is not None or run.entering:
            self._end_piece(run)
            if batch is None:
                stage = min(run.entering)
            batch = self._enter(batch, stage, run)
            boundary = self._next_boundary(run, batch, stage)
            run.piece = Piece(range(stage, boundary + 1), len(batch.parts), batch.hidden.shape[0])
            batch = self._run_stages(run, batch, stage, boundary)
            stage = boundary + 1

    def _pass_whole(self, run: TickRun, whole: WholePass) -> None:
        """Run a tick in one call: it does what the stages, one after the other, would."""
        began = self._clock()
        found = whole.run(self._held)
        told = found.settle(run.results, self._held)
        if told:
            run.undrawn.append(Undrawn(told, found.passed.logits))
            if found.passed.drawn is not None:
                run.draws = told_draws(*found.passed.drawn)
        for piece, seconds in found.pieces():
            if run.piece is not None:
                self._on_stages(run.ended_piece(began, 0.0))
            run.piece, began = piece, began + seconds
        found.audit(self._auditor, self._model.decoder(run.tick.variant), self._pages[run.tick.variant])

    def _end_piece(self, run: TickRun) -> float:
        """Tell of the stages that ran up to now, if any did; returns the time."""
        ended = self._clock()
        if run.piece is not None:
            self._on_stages(run.ended_piece(ended, self._auditor.take_seconds()))
        return ended

    def _begun_ahead(self, run: TickRun, successor: Successor) -> TickRun | None:
        """The tick that follows, begun before this one's tokens are on the host; None where that cannot be."""
        if not self._goes_ahead or run.draws is None or run.draws.ids is None:
            return None
        tick = successor(run.tick)
        if tick is None:
            return None
        ahead = TickRun(tick, self._clock())
        try:
            self._begin(ahead, run, run.draws.ids)
        except Exception:
            self._goes_ahead = False  # whose trouble it is shows when the tick has its turn
            log.warning("no step is begun before its turn any more: the last such failed", exc_info=True)
            rows = {row.sequence: row for row in run.tick.rows}
            for row, result in ahead.results.items():
                run.results[rows[row.sequence]].blocks_beside += result.pairs
            return None
        return ahead

    def _begin(self, ahead: TickRun, run: TickRun, drawn: Tensor) -> None:
        """Run a tick of decode steps up to its draws, each behind a token that the tick `run` has `drawn` [rows]."""
        parts = [Part(row, row.positions) for row in ahead.entering.pop(0)]
        places = {row.sequence: place for place, row in enumerate(run.drawn_rows)}
        order = [places[part.row.sequence] for part in parts]
        geometry, index = placed(parts, self._device, order)
        embed = self._model.decoder(ahead.tick.variant).embed
        hidden = embed(drawn.index_select(0, index).long(), geometry.positions)
        ahead.piece = Piece(range(self._plan.stages), len(parts), len(parts))
        self._run_stages(ahead, TickBatch(parts, geometry, hidden), 0, self._plan.last)
        self._start_draws(ahead)

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

    def _run_stages(self, run: TickRun, batch: TickBatch, stage: int, boundary: int) -> TickBatch | None:
        """Run stages `stage` to `boundary` in one piece and say what is left to be run in this tick."""
        variant = run.tick.variant
        decoder, pages = self._model.decoder(variant), self._pages[variant]
        first, stop = self._plan.start(stage), self._plan.stop(boundary)
        batch.hidden = decoder.run_blocks(batch.hidden, batch.geometry, pages, first, stop)
        for part in batch.parts:
            run.results[part.row].count(part.positions, stop - first)
        if boundary == self._plan.last:
            self._finish(decoder, batch, run)
            return None
        left = self._after_exit(boundary, decoder, pages, batch, run)
        if left is not None and boundary == run.tick.last_stage:
            for part, start, end in left.spans():
                self._held.put_back(part.row.sequence, part.positions, left.hidden[start:end], boundary + 1)
                run.results[part.row].waits_at = boundary + 1
            return None
        return left

    def _next_boundary(self, run: TickRun, batch: TickBatch, stage: int) -> int:
        """How far to run in one piece: to where a row asks a gate, or tokens come in, or to the tick's end."""
        for boundary in range(stage, run.tick.last_stage):
            if boundary + 1 in run.entering:
                return boundary
            for part in batch.parts:
                row, sequence = part.row, part.row.sequence
                asks = row.may_leave and self._plan.asks(sequence.exits.mode, boundary)
                if asks or boundary + 1 in sequence.pending:
                    return boundary
        return run.tick.last_stage

    def _enter(self, batch: TickBatch | None, stage: int, run: TickRun) -> TickBatch:
        """The batch in front of `stage`: what comes from the stage before, rows that begin, tokens that waited here."""
        rows = run.entering.pop(stage, [])
        if stage == 0:
            parts = [Part(row, row.positions) for row in rows]
            tokens = [part.row.sequence.tokens[p] for part in parts for p in part.positions]
            geometry, ids = placed(parts, self._device, tokens)
            embed = self._model.decoder(run.tick.variant).embed
            return TickBatch(parts, geometry, embed(ids, geometry.positions))
        arrived = list(batch.spans()) if batch is not None else []
        arrived += [(Part(row, []), 0, 0) for row in rows]
        if batch is not None and not rows and not any(stage in p.row.sequence.pending for p, _, _ in arrived):
            return batch
        parts, states = [], []
        for part, start, stop in arrived:
            waiting, held = self._held.take(part.row.sequence, stage)
            states += held  # they are older than what arrives
            if start < stop and batch is not None:
                states.append(batch.hidden[start:stop])
            parts.append(Part(part.row, waiting + part.positions))
        return TickBatch(parts, geometry_of(parts, self._device), torch.cat(states))

    def _finish(self, decoder: Decoder, batch: TickBatch, run: TickRun) -> None:
        """The last stage: the model's own head for every token that is wanted."""
        tokens = batch.tokens()
        self._auditor.arrive(tokens, batch.hidden, decoder)
        wanted = [
            i for i, (row, p) in enumerate(tokens) if row.sequence.wants_logits(p) and p not in row.left
        ]
        if not wanted:
            return
        states = selected(batch.hidden, wanted)
        self._emit([tokens[i] for i in wanted], decoder.head(states), self._plan.last, run)

    def _after_exit(
        self, stage: int, decoder: Decoder, pages: KVPages, batch: TickBatch, run: TickRun
    ) -> TickBatch | None:
        """A stage has ended in an exit: what is left of the batch when those that leave there are gone."""
        tokens, gated, gone = batch.tokens(), [], set()
        for index, (row, position) in enumerate(tokens):
            if row.sequence.recorded_stage(position) == stage:
                gone.add(index)
            elif self._asks_gate(row, position, stage, run):
                gated.append(index)
        if gated:
            leaving, logits = self._gate(stage, decoder, batch.hidden, tokens, gated, run)
            if leaving:
                skipped = range(self._plan.stop(stage), self._plan.blocks)
                self._auditor.leave(
                    [(i, *tokens[i]) for i in leaving], logits, batch, decoder, pages, skipped
                )
            gone.update(i for i in leaving if tokens[i][0].sequence.replays_exits)
        else:
            leaving = []
        if gone:
            self._propagate(stage, decoder, pages, batch, sorted(gone))
        gone.update(self._wait_here(stage, batch, {tokens[i][0] for i in leaving}))
        return without(batch, gone) if gone else batch

    def _asks_gate(self, row: Row, position: int, stage: int, run: TickRun) -> bool:
        """Whether the token at `position` may leave at the end of `stage`: the last of a decode step, any of a text."""
        sequence = row.sequence
        if row.threshold is None or not self._plan.asks(sequence.exits.mode, stage):
            return False
        last = sequence.scoring or position == len(sequence.tokens) - 1
        return last and position not in row.left

    def _wait_here(self, stage: int, batch: TickBatch, left: set[Row]) -> list[int]:
        """Have the rows that left wait in front of the next stage, with the tokens they took along, and name these."""
        waiting: list[int] = []
        for part, start, stop in batch.spans():
            row, sequence = part.row, part.row.sequence
            if row in left and not (row.deep or sequence.scoring or sequence.replays_exits):
                self._held.put_back(sequence, part.positions, batch.hidden[start:stop], stage + 1)
                waiting += range(start, stop)
        return waiting

    def _gate(
        self,
        stage: int,
        decoder: Decoder,
        hidden: Tensor,
        tokens: list[tuple[Row, int]],
        gated: list[int],
        run: TickRun,
    ) -> tuple[list[int], Tensor]:
        """Ask the exit's gate about the tokens `gated`; emit those that leave and say which, with their logits."""
        timer = GateTimer(self._device, self._clock, lambda: self.captured_seconds)
        states = selected(hidden, gated)
        thresholds = [tokens[i][0].threshold for i in gated]
        asked = staged(np.array(thresholds, dtype=np.float32), self._device)
        gate = self._model.exits[stage].gate(states, asked, decoder.project_exit)
        leaves = gate.leaves.tolist()
        run.note_gate(len(gated), timer.seconds())
        leaving = [index for index, leave in zip(gated, leaves, strict=True) if leave]
        if not leaving:
            return [], gate.logits[:0]
        for i in leaving:
            row, position = tokens[i]
            row.left.add(position)
        self._emit([tokens[i] for i in leaving], gate.logits, stage, run)
        return leaving, gate.logits

    def _propagate(
        self, stage: int, decoder: Decoder, pages: KVPages, batch: TickBatch, left: list[int]
    ) -> None:
        """Write the deeper blocks' keys and values of tokens that leave, from their state at the exit."""
        hidden, geometry = of_tokens(batch, left)  # nothing attends here: whose they are does not matter
        decoder.project_kv(hidden, geometry, pages, self._plan.stop(stage), self._plan.blocks)

    def _emit(self, wanted: list[tuple[Row, int]], logits: Tensor, stage: int, run: TickRun) -> None:
        """Note what the next token of rows that decode is drawn from, and look up the given one of rows that score."""
        scored = [i for i, (row, _) in enumerate(wanted) if row.sequence.scoring]
        drawn = [i for i, (row, _) in enumerate(wanted) if not row.sequence.scoring]
        if scored:
            self._score([wanted[i] for i in scored], selected(logits, scored), stage, run)
        if drawn:
            tokens = [(*wanted[i], stage) for i in drawn]
            run.undrawn.append(Undrawn(tokens, selected(logits, drawn)))

    def _score(self, wanted: list[tuple[Row, int]], logits: Tensor, stage: int, run: TickRun) -> None:
        targets = integers([row.sequence.tokens[position + 1] for row, position in wanted], self._device)
        logprobs = logits.float().log_softmax(dim=-1).gather(1, targets[:, None]).flatten().tolist()
        for (row, position), logprob in zip(wanted, logprobs, strict=True):
            run.results[row].scores.append(Score(position, logprob, stage))

    def _start_draws(self, run: TickRun) -> None:
        """Sample the next tokens of all rows that left in this tick, wherever they did, in one go."""
        if not run.undrawn or run.draws is not None:
            return
        parts = [some.logits for some in run.undrawn]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        tokens = [token for some in run.undrawn for token in some.tokens]
        asks = [self._sampling(row.sequence, position) for row, position, _ in tokens]
        run.draws = start_each(logits, asks, self._model.spec.eos_token_ids, self._graphs)

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
            history = []
        else:
            history = tokens if position == len(tokens) - 1 else tokens[: position + 1]
        return RowSampling(sampler.params, sampler.choice, position + 1 - sequence.prompt_tokens, history)
