"""Where the tokens of a tick went whose exits a GPU decided, once the host hears of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.compression.device_pass import PassResults
from exeunt.compression.kv_format import KVPages
from exeunt.kernels.model_pass import AtExit, PassOutcome
from exeunt.server.auditor import Auditor
from exeunt.server.held_states import HeldStates
from exeunt.server.pass_parts import PassParts
from exeunt.server.row import Row
from exeunt.server.sequence import Status
from exeunt.server.stages import StagePlan
from exeunt.server.tick_batch import integers
from exeunt.server.tick_run import StageShare, TickRun, Undrawn
from exeunt.server.whole_run import WholeRun


@dataclass(frozen=True, slots=True)
class DeviceRun:
    """A tick of which the device knows who left where, and the host not yet."""

    plan: StagePlan
    parts: PassParts
    tokens: list[tuple[Row, int]]
    with_logits: list[int]  # tokens
    results: PassResults
    decoder: Decoder
    pages: KVPages
    held: HeldStates
    auditor: Auditor

    @property
    def left_at(self) -> Tensor:
        """At which exit each token of `with_logits` left: see `PassResults`."""
        return self.results.left_at[: len(self.with_logits)]

    def note_exits(self, run: TickRun, left_at: Sequence[int]) -> None:
        """Note where the tokens left: with their logits, in the accounts, for the audits.

        What an answer had that has ended meanwhile may be another's by now: nothing of it is noted or audited, and all
        of its step has been accounted for.
        """
        stopped = self._stopped(left_at)
        stages = self._stages(left_at, stopped)
        outcome = self._outcome(stages, stopped)
        for stage, count in enumerate(outcome.tokens):
            start, stop = self.plan.start(stage), self.plan.stop(stage)
            self.decoder.block_calls.uncount(start, stop, len(self.tokens) - count)
        for row, result in run.results.items():
            if row.sequence.status is Status.RUNNING:
                result.pairs = result.passes = 0  # counted anew, by how far it went
        whole = WholeRun(self.plan, self.parts.parts, self.tokens, outcome)
        whole.settle(run.results, self.held)
        tokens = [(*self.tokens[token], at) for token, at in zip(self.with_logits, stages, strict=True)]
        run.undrawn = [Undrawn(tokens, self.results.logits[: len(tokens)])]
        if run.piece is not None:
            run.piece.by_stage = self._by_stage(outcome)
        if self.auditor.enabled:
            whole.audit(self.auditor, self.decoder, self.pages)

    def _stopped(self, left_at: Sequence[int]) -> list[int]:
        """Behind which exit each token stopped, the model's end after all of them, -1 where it never came in."""
        tokens, rows, last = self.parts.tokens, self.parts.rows, self.plan.last
        exit_of = dict(zip(self.with_logits, left_at, strict=True))
        ends = [0]
        for count in rows.tokens:
            ends.append(ends[-1] + count)
        stopped: list[int] = []
        for (start, stop), kind in zip(pairwise(ends), rows.at_exits, strict=True):
            newest = stop - 1
            left = exit_of[newest] if tokens.asks[newest] and kind != AtExit.STAYS else last
            stopped += [left if left == last or entry <= left else -1 for entry in tokens.entries[start:stop]]
        return stopped

    def _stages(self, left_at: Sequence[int], stopped: list[int]) -> list[int | None]:
        """At the end of which stage each row of logits stands, None for one whose token stopped on its way."""
        last = self.plan.last
        return [
            left if left < last else (last if stopped[token] == last else None)
            for token, left in zip(self.with_logits, left_at, strict=True)
        ]

    def _outcome(self, stages: list[int | None], stopped: list[int]) -> PassOutcome:
        """The same as of a native call; of answers that have ended, all tokens count in all stages."""
        alive = [row.sequence.status is Status.RUNNING for row, _ in self.tokens]
        rows_of_logits = range(len(stages))
        by_stage = [
            [n for n in rows_of_logits if stages[n] == stage and alive[self.with_logits[n]]]
            for stage in range(self.plan.stages)
        ]
        order = [n for some in by_stage for n in some]
        logits = self.results.logits
        if self.auditor.enabled:  # who alone reads them in this order
            logits = logits.index_select(0, integers(order, logits.device))
        there = [
            [
                row
                for (row, _), lives, entry, stop in zip(
                    self.tokens, alive, self.parts.tokens.entries, stopped, strict=True
                )
                if not lives or entry <= stage <= stop
            ]
            for stage in range(self.plan.stages)
        ]
        return PassOutcome(
            with_logits=[self.with_logits[n] for n in order],
            stopped=stopped,
            tokens=[len(some) for some in there],
            rows=[len(set(some)) for some in there],
            logits_of=[len(some) for some in by_stage],
            logits=logits,
            states=self.results.states,
        )

    def _by_stage(self, outcome: PassOutcome) -> list[StageShare]:
        """The stages that tokens were in."""
        stages = [stage for stage, tokens in enumerate(outcome.tokens) if tokens]
        blocks = [self.plan.stop(stage) - self.plan.start(stage) for stage in stages]
        return [
            StageShare(stage, outcome.rows[stage], outcome.tokens[stage], size / sum(blocks))
            for stage, size in zip(stages, blocks, strict=True)
        ]
