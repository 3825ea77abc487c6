"""Ticks that go through the model's stages one piece after the other, with the gates in between: on every device."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.compression.host_memory import staged
from exeunt.compression.kv_format import KVPages
from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.server.auditor import Auditor
from exeunt.server.gate_timer import GateTimer
from exeunt.server.held_states import HeldStates
from exeunt.server.row import Row
from exeunt.server.row_result import Score
from exeunt.server.stages import StagePlan
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
from exeunt.server.tick_run import Piece, TickRun, Undrawn


class StagedPasses:
    """Takes ticks of one engine through the stages. What is drawn from is noted with the tick, and not drawn."""

    def __init__(
        self,
        model: LoadedModel,
        plan: StagePlan,
        pages: Mapping[Variant, KVPages],
        held: HeldStates,
        auditor: Auditor,
        clock: Callable[[], float],
        captured_seconds: Callable[[], float],
    ) -> None:
        """`clock` stands still while CUDA graphs are captured, which has taken `captured_seconds` so far."""
        self._model, self._plan, self._pages, self._held = model, plan, pages, held
        self._auditor, self._clock, self._captured_seconds = auditor, clock, captured_seconds
        self._device = model.device

    def run(self, run: TickRun, end_piece: Callable[[], object]) -> None:
        """Run a tick's stages, `end_piece` in front of each piece; the last is not waited for."""
        batch: TickBatch | None = None
        stage = run.tick.first_stage
        while batch is not None or run.entering:
            end_piece()
            if batch is None:
                stage = min(run.entering)
            batch = self._enter(batch, stage, run)
            boundary = self._next_boundary(run, batch, stage)
            run.piece = Piece(range(stage, boundary + 1), len(batch.parts), batch.hidden.shape[0])
            batch = self.run_stages(run, batch, stage, boundary)
            stage = boundary + 1

    def run_stages(self, run: TickRun, batch: TickBatch, stage: int, boundary: int) -> TickBatch | None:
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
                asks = row.threshold is not None and self._plan.asks(sequence.exits.mode, boundary)
                if asks or boundary + 1 in sequence.pending or _leaves_again(part, boundary):
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
        self._auditor.arrive([(i, *token) for i, token in enumerate(tokens)], batch.hidden, decoder)
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
            elif self._asks_gate(row, position, stage):
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

    def _asks_gate(self, row: Row, position: int, stage: int) -> bool:
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
        timer = GateTimer(self._device, self._clock, self._captured_seconds)
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


def _leaves_again(part: Part, stage: int) -> bool:
    """Whether a token of a part left at the end of `stage` once, and must do so again."""
    sequence = part.row.sequence
    replays = sequence.replays_exits and bool(sequence.left_at)
    return replays and any(sequence.recorded_stage(position) == stage for position in part.positions)
