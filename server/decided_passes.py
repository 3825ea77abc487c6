"""Decode steps whose exits a GPU decides by itself: the host hears of it with the tokens, when all has run."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from exeunt.compression.decided_pass import AskedExit, DecidedPass
from exeunt.compression.decoder import Decoder
from exeunt.compression.host_memory import Fetch, staged
from exeunt.compression.kv_format import KVPages
from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.server.auditor import Auditor
from exeunt.server.row import Row
from exeunt.server.sequence import Status
from exeunt.server.stages import StagePlan
from exeunt.server.tick import Tick
from exeunt.server.tick_batch import TickBatch, selected
from exeunt.server.tick_run import Piece, TickRun, Undrawn


class DecidedPasses:
    """Takes ticks of one engine through all stages without asking who left, where every row is one it can take.

    Rows whose keys and values are propagated leave for good, so that nothing but the next token's place hangs on where
    they left. With backfill a row that left waits at the exit, which is for the host to arrange.
    """

    def __init__(
        self, model: LoadedModel, plan: StagePlan, pages: Mapping[Variant, KVPages], auditor: Auditor
    ) -> None:
        self._model, self._plan, self._pages, self._auditor = model, plan, pages, auditor
        self._asked = [stage for stage in range(plan.last) if plan.asks("approximate", stage)]

    @property
    def any_exits(self) -> bool:
        """Whether there is an exit that could be asked."""
        return bool(self._asked)

    def takes(self, tick: Tick) -> bool:
        """Whether the tick is a decode step through all stages in which a row may leave, and all leave for good."""
        through = tick.first_stage == 0 and tick.last_stage == self._plan.last
        asks = any(row.threshold is not None for row in tick.rows)
        return through and asks and all(self._takes_row(row) for row in tick.rows)

    def _takes_row(self, row: Row) -> bool:
        sequence = row.sequence
        if row.stage or len(row.positions) != 1 or sequence.scoring or sequence.pending or sequence.drafts:
            return False
        if row.positions[0] < len(sequence.tokens) - 1:  # a prompt's, or one that is computed again
            return False
        return row.threshold is None or sequence.replays_exits

    def run(self, run: TickRun, batch: TickBatch) -> bool:
        """Take a tick's rows, embedded in `batch`, up to their logits; false where nothing could be done.

        Until `run` is settled all of them stand as if they had gone to the model's end.
        """
        decoder, pages = self._model.decoder(run.tick.variant), self._pages[run.tick.variant]
        thresholds = [np.inf if p.row.threshold is None else p.row.threshold for p in batch.parts]
        asked = staged(np.array(thresholds, dtype=np.float32), batch.hidden.device)
        found = decoder.decide(batch.hidden, batch.geometry, pages, asked, self._exits(decoder))
        if found is None:
            return False
        last, tokens = self._plan.last, batch.tokens()
        run.entering.clear()
        run.piece = Piece(range(self._plan.stages), len(tokens), len(tokens))
        for part in batch.parts:
            run.results[part.row].count(part.positions, self._plan.blocks)
        run.undrawn.append(Undrawn([(*token, last) for token in tokens], found.logits))
        run.unsettled = _Unsettled(self, run, tokens, found, decoder, Fetch(found.left_at)).settle
        return True

    def _exits(self, decoder: Decoder) -> list[AskedExit]:
        heads = self._model.exits
        return [
            AskedExit(self._plan.stop(stage), heads[stage].steps, decoder.project_exit)
            for stage in self._asked
        ]

    def settle(
        self,
        run: TickRun,
        tokens: list[tuple[Row, int]],
        found: DecidedPass,
        decoder: Decoder,
        left_at: list[int],
    ) -> None:
        """Note where the tokens left: with their logits, in the accounts, for the audits."""
        stages = [*self._asked, self._plan.last]
        run.undrawn = [
            Undrawn(
                [(*token, stages[place]) for token, place in zip(tokens, left_at, strict=True)], found.logits
            )
        ]
        for place, stage in enumerate(self._asked):
            # what a sequence has that is gone may be another's by now, and all of its step has been accounted for
            leaving = [
                (i, *tokens[i])
                for i, left in enumerate(left_at)
                if left == place and tokens[i][0].sequence.status is Status.RUNNING
            ]
            if leaving:
                self._leave(run, leaving, stage, found.states[place], found.logits, decoder)

    def _leave(
        self,
        run: TickRun,
        leaving: list[tuple[int, Row, int]],
        stage: int,
        states: Tensor,
        logits: Tensor,
        decoder: Decoder,
    ) -> None:
        depth, blocks = self._plan.stop(stage), self._plan.blocks
        decoder.block_calls.spare(depth, blocks, len(leaving))
        for _, row, position in leaving:
            row.left.add(position)
            run.results[row].spare(blocks - depth)
        if self._auditor.watches:
            own, pages = selected(logits, [i for i, _, _ in leaving]), self._pages[run.tick.variant]
            self._auditor.left_in_one_call(leaving, own, states, decoder, pages, depth)


@dataclass(frozen=True, slots=True)
class _Unsettled:
    """A tick of which the device knows who left where, and the host not yet."""

    passes: DecidedPasses
    run: TickRun
    tokens: list[tuple[Row, int]]
    found: DecidedPass
    decoder: Decoder
    coming: Fetch

    def settle(self) -> None:
        """Wait for it and note it."""
        left_at = self.coming.wait().tolist()
        self.passes.settle(self.run, self.tokens, self.found, self.decoder, left_at)
