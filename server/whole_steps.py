"""Decode steps that one native call takes through all blocks: which ticks are such, and where their tokens went."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import from_numpy

from exeunt.compression.decode_pass import DecodePass
from exeunt.compression.decoder import Decoder
from exeunt.compression.kv_format import KVPages
from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.kernels.decode_pass import Passed
from exeunt.server.auditor import Auditor
from exeunt.server.row import Row
from exeunt.server.row_result import RowResult
from exeunt.server.stages import StagePlan
from exeunt.server.tick import Tick
from exeunt.server.tick_batch import Part, TickBatch
from exeunt.server.tick_run import Piece


class WholeSteps:
    """The passes of a model's variants through all of their blocks at once, where the kernels have such."""

    def __init__(self, model: LoadedModel, plan: StagePlan) -> None:
        self._model, self._plan = model, plan
        self._asked = [stage for stage in range(plan.last) if plan.asks("approximate", stage)]
        self._passes: dict[Variant, DecodePass | None] = {}  # made when first asked for

    def takes(self, tick: Tick, pages: KVPages) -> bool:
        """Whether a tick is of decode steps alone, each of one token that nothing waits for, over pages that can be.

        Such a token leaves for good or passes all blocks: no row drafts, owes positions, is scored or replayed.
        """
        if tick.first_stage != 0 or tick.last_stage != self._plan.last:
            return False
        found = self._pass(tick.variant)
        return found is not None and all(map(_is_whole, tick.rows)) and found.takes(pages, len(tick.rows))

    def run(self, tick: Tick, batch: TickBatch, pages: KVPages) -> "WholeStep":
        """Take a tick's batch, whose states are lost, through the blocks, asking exits about rows with a threshold."""
        found = self._pass(tick.variant)
        if found is None:
            raise RuntimeError(f"{tick.variant} has no pass through all of its blocks at once")
        asks = any(row.threshold is not None for row in tick.rows)
        needed = [math.inf if row.threshold is None else row.threshold for row in tick.rows]
        thresholds = from_numpy(np.array(needed, np.float32))
        asked = self._asked if asks else []
        passed = found.run(batch.hidden, batch.geometry, pages, asked, thresholds)
        return WholeStep(self._plan, tuple(batch.parts), asked, passed)

    def _pass(self, variant: Variant) -> DecodePass | None:
        if variant not in self._passes:
            self._passes[variant] = DecodePass.of(self._model.decoder(variant), self._model.exits)
        return self._passes[variant]


@dataclass(frozen=True, slots=True)
class WholeStep:
    """What became of a tick's tokens."""

    plan: StagePlan
    parts: tuple[Part, ...]  # the tick's
    asked: list[int]  # the stages whose exits were
    passed: Passed

    def settle(self, results: Mapping[Row, RowResult]) -> list[tuple[Row, int, int]]:
        """Note with the rows and their results how far they went; returns row, position and stage of all logits."""
        found, last = [], self.plan.last
        for stage, some in self._departures():
            depth = self.plan.stop(stage)
            for part in some:
                row, position = part.row, part.positions[0]
                found.append((row, position, stage))
                results[row].count(part.positions, depth)
                if stage < last:
                    row.left.add(position)
        return found

    def audit(self, auditor: Auditor, decoder: Decoder, pages: KVPages) -> None:
        """Begin the audits of tokens that left, whose skipped blocks have their keys and values already."""
        start = 0
        for stage, some in self._departures():
            if stage < self.plan.last:
                rows = slice(start, start + len(some))
                skipped = range(self.plan.stop(stage), self.plan.blocks)
                logits, states = self.passed.logits[rows], self.passed.states[rows]
                auditor.left_for_good(some, logits, states, decoder, pages, skipped)
            start += len(some)

    def _departures(self) -> Iterator[tuple[int, list[Part]]]:
        """Where tokens went, by stage, as far as any went there: left at its end or, behind the last, stayed."""
        passed, start = self.passed, 0
        for stage, count in zip((*self.asked, self.plan.last), (*passed.left, passed.stayed), strict=True):
            if count:
                yield stage, [self.parts[i] for i in passed.order[start : start + count]]
            start += count

    def pieces(self) -> Iterator[tuple[Piece, float]]:
        """The stages run in one piece, with their seconds; of the last, which draws follow, these are not known."""
        passed, first, tokens, seconds = self.passed, 0, len(self.passed.order), 0.0
        for place, stage in enumerate(self.asked):
            if not tokens:
                return
            seconds += passed.seconds[place]
            gated = passed.gated[place]
            if not gated:  # nobody who came so far: it goes on in one piece
                continue
            yield Piece(range(first, stage + 1), tokens, tokens, gated, passed.gate_seconds[place]), seconds
            first, tokens, seconds = stage + 1, tokens - passed.left[place], 0.0
        if tokens:
            yield Piece(range(first, self.plan.last + 1), tokens, tokens), 0.0


def _is_whole(row: Row) -> bool:
    """Whether a row is one newest token that passes all blocks, or leaves at an exit without owing anything."""
    sequence = row.sequence
    return (
        len(row.positions) == 1
        and not row.stage
        and not sequence.pending
        and sequence.yields_token(row.positions)
        and (row.threshold is None or sequence.replays_exits)
    )
