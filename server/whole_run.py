"""Where the tokens of a tick went that one call took through all blocks: native, or a device's graph."""

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

from exeunt.compression.decoder import Decoder
from exeunt.compression.kv_format import KVPages
from exeunt.kernels.model_pass import Passed, PassOutcome
from exeunt.server.auditor import Auditor
from exeunt.server.held_states import HeldStates
from exeunt.server.row import Row
from exeunt.server.row_result import RowResult
from exeunt.server.sequence import Status
from exeunt.server.stages import StagePlan
from exeunt.server.tick_batch import Part
from exeunt.server.tick_run import Piece


class WholeRun(NamedTuple):
    """What became of a tick's tokens."""

    plan: StagePlan
    parts: list[Part]
    tokens: list[tuple[Row, int]]  # theirs: row and position
    passed: PassOutcome

    def settle(self, results: Mapping[Row, RowResult], held: HeldStates) -> list[tuple[Row, int, int]]:
        """Note with the rows and their results how far they went; returns row, position and stage of all logits.

        Of an answer that has ended since its step was begun nothing is noted.
        """
        start = 0
        for part in self.parts:
            stop = start + len(part.positions)
            if part.row.sequence.status is Status.RUNNING:
                self._settle_row(part, start, stop, results[part.row], held)
            start = stop
        found = []
        for stage, places in self._with_logits():
            for place in places:
                row, position = self.tokens[place]
                found.append((row, position, stage))
                if stage < self.plan.last:
                    row.left.add(position)
        return found

    def _settle_row(self, part: Part, start: int, stop: int, result: RowResult, held: HeldStates) -> None:
        """Count the blocks that a row's tokens took; those that stop at an exit wait there, unless they are gone.

        All of its tokens that came in stop at one place: only a row of one token leaves for good. Those that did not
        come in are the older ones, which wait deeper than the row went.
        """
        row, sequence, plan = part.row, part.row.sequence, self.plan
        stopped, came = self.passed.stopped[start:stop], start
        if sequence.pending:
            waiting = sorted(sequence.pending, reverse=True)
            ends = list(accumulate(len(sequence.pending[stage]) for stage in waiting))  # before any is taken
            for stage, end in zip(waiting, ends, strict=True):
                at = stopped[end - 1]
                if at < 0:
                    came = start + end
                    continue
                positions, _ = held.take(sequence, stage)
                # they are older than a token that brought them along, whose row has been counted with it
                joined = bool(row.positions) or stage > row.stage
                result.count(positions, plan.stop(at) - plan.start(stage), joined=joined)
        at = stopped[-1]
        if row.positions:
            result.count(row.positions, plan.stop(at))
        if at < plan.last and not sequence.replays_exits:
            positions = part.positions[came - start :]
            held.put_back(sequence, positions, self.passed.states[came:stop], at + 1)

    def audit(self, auditor: Auditor, decoder: Decoder, pages: KVPages) -> None:
        """Begin the audits of tokens that left, and go on with those of tokens that have passed all blocks since."""
        passed, first = self.passed, 0
        for stage, places in self._with_logits():
            if places and stage < self.plan.last:
                leaving = [(place, *self.tokens[place]) for place in places]
                logits, depth = passed.logits[first : first + len(places)], self.plan.stop(stage)
                auditor.left_in_one_call(leaving, logits, passed.states, decoder, pages, depth)
            first += len(places)
        ended = [place for place, stage in enumerate(passed.stopped) if stage == self.plan.last]
        auditor.arrive([(place, *self.tokens[place]) for place in ended], passed.states, decoder)

    def _with_logits(self) -> Iterator[tuple[int, list[int]]]:
        """By stage the tokens whose logits are those of its end."""
        start = 0
        for stage, count in enumerate(self.passed.logits_of):
            yield stage, self.passed.with_logits[start : start + count]
            start += count


def pieces(plan: StagePlan, passed: Passed) -> Iterator[tuple[Piece, float]]:
    """The stages run in one piece by a native call, with the seconds that it took for them."""
    first, seconds, last = None, 0.0, plan.last
    for stage, tokens in enumerate(passed.tokens):
        if not tokens:  # all have left, or nobody has begun yet
            continue
        first = stage if first is None else first
        seconds += passed.seconds[stage]
        if stage == last:
            yield Piece(range(first, stage + 1), passed.rows[first], tokens), seconds
        elif passed.ends_piece[stage]:
            gated, of_gate = passed.gated[stage], passed.gate_seconds[stage]
            stages = range(first, stage + 1)
            yield Piece(stages, passed.rows[first], tokens, gated, of_gate), seconds
            first, seconds = None, 0.0
