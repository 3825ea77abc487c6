"""Ticks whose exits a GPU decides by itself: the host hears of it with the tokens, when all has run."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from exeunt.compression.decided_pass import DecidedPass, PassDecisions, PassExit
from exeunt.compression.decoder import Decoder
from exeunt.compression.host_memory import Fetch
from exeunt.compression.kv_format import KVPages
from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.kernels.model_pass import AtExit, Passed
from exeunt.server.auditor import Auditor
from exeunt.server.decided_numbers import DecidedNumbers, for_good
from exeunt.server.held_states import HeldStates
from exeunt.server.pass_parts import PassParts
from exeunt.server.row import Row
from exeunt.server.sequence import Status
from exeunt.server.stages import StagePlan
from exeunt.server.tick import Tick
from exeunt.server.tick_batch import selected
from exeunt.server.tick_run import Piece, TickRun, Undrawn
from exeunt.server.whole_run import WholeRun


class DecidedPasses:
    """Takes ticks of one engine through all stages in one call, without asking who leaves where."""

    def __init__(
        self,
        model: LoadedModel,
        plan: StagePlan,
        pages: Mapping[Variant, KVPages],
        held: HeldStates,
        auditor: Auditor,
    ) -> None:
        self._model, self._plan, self._pages = model, plan, pages
        self._held, self._auditor = held, auditor
        self._asked = sum(1 << stage for stage in range(plan.last) if plan.asks("approximate", stage))

    @property
    def any_exits(self) -> bool:
        """Whether there is an exit that could be asked."""
        return self._asked != 0

    def takes(self, tick: Tick) -> bool:
        """Whether the tick runs all stages and asks an exit of the approximate mode.

        What scores a text or repeats exits goes by stages, and so does what asks the exit that drafts: whether that
        pays is told by what its stages and its gate take.
        """
        through = tick.first_stage == 0 and tick.last_stage == self._plan.last
        asks = any(row.threshold is not None for row in tick.rows)
        return through and asks and all(map(_takes_row, tick.rows))

    def run(self, run: TickRun, drawn: Tensor | None = None, order: list[int] | None = None) -> bool:
        """Take a tick's rows up to their logits; false where no captured graph has room: nothing has been done then.

        Where the host does not know the rows' tokens yet, row i's is `drawn[order[i]]`. Until `run` is settled all rows
        stand as if they had gone to the model's end.
        """
        variant, device = run.tick.variant, self._model.device
        decoder, pages = self._model.decoder(variant), self._pages[variant]
        parts = PassParts(lambda *_: None, draws=False)
        for row in run.tick.rows:
            parts.add(row, self._asked)
        waiting = [i for i, entry in enumerate(parts.tokens.entries) if entry]
        beside = [*(order if order is not None else parts.tokens.ids), *waiting]
        numbers = DecidedNumbers.of(parts, pages.layout.page_tokens, device, beside)
        if numbers is None:
            return False
        own = len(beside) - len(waiting)
        ids, places = numbers.beside[:own], numbers.beside[own:]
        if drawn is not None:
            ids = drawn.index_select(0, ids).long()
        hidden = decoder.embed(ids, numbers.batch.positions)
        if waiting:
            hidden.index_copy_(0, places, self._waiting(parts))
        exits = self._exits(decoder, parts)
        decisions = PassDecisions(numbers.layout, numbers.decided, exits, for_good(parts), self._plan.last)
        found = decoder.decide(hidden, numbers.batch, pages, decisions)
        if found is None:
            return False
        self._note(run, parts, numbers.with_logits, found, decoder)
        return True

    def _waiting(self, parts: PassParts) -> Tensor:
        """The states of tokens that wait behind an exit, in the order of the parts' tokens."""
        held = [
            state
            for part in parts.parts
            for stage in sorted(part.row.sequence.pending, reverse=True)  # the deeper the older
            for state in self._held.look(part.row.sequence, stage)
        ]
        return torch.cat(held)

    def _exits(self, decoder: Decoder, parts: PassParts) -> tuple[PassExit, ...]:
        """The exits at which a token may leave or come in.

        Where rows wait at exits others come in at one time and not at another: one graph does for both.
        """
        entries, asks = set(parts.tokens.entries), set(parts.tokens.asks)
        waits = any(kind != AtExit.LEAVES for kind in parts.rows.at_exits)
        found = []
        for place in range(self._plan.last):
            asked = any(bits >> place & 1 for bits in asks)
            joined = place + 1 in entries or (asked and waits)
            if asked or joined:
                steps = self._model.exits[place].steps
                depth = self._plan.stop(place)
                found.append(PassExit(place, depth, asked, joined, steps, decoder.project_exit))
        return tuple(found)

    def _note(
        self,
        run: TickRun,
        parts: PassParts,
        with_logits: list[int],
        found: DecidedPass,
        decoder: Decoder,
    ) -> None:
        tokens = [(part.row, position) for part in parts.parts for position in part.positions]
        run.entering.clear()
        run.piece = Piece(range(self._plan.stages), len(parts.parts), len(tokens))
        for part in parts.parts:
            if part.row.positions:
                run.results[part.row].count(part.row.positions, self._plan.blocks)
        undrawn = [(*tokens[token], self._plan.last) for token in with_logits]
        run.undrawn.append(Undrawn(undrawn, found.logits[: len(undrawn)]))
        coming = Fetch(found.left_at)
        run.unsettled = _Unsettled(self, run, parts, tokens, with_logits, found, decoder, coming).settle

    def settle(self, told: "_Unsettled", left_at: list[int]) -> None:
        """Note where the tokens left: with their logits, in the accounts, for the audits."""
        run, last = told.run, self._plan.last
        stopped = _stopped(told, left_at, last)
        stages: list[int | None] = [
            left if left < last else (last if stopped[token] == last else None)
            for token, left in zip(told.with_logits, left_at, strict=False)  # what is behind them is padding
        ]
        alive = [row.sequence.status is Status.RUNNING for row, _ in told.tokens]
        # what an answer had that has ended may be another's by now: nothing of it is audited
        by_stage = [
            [n for n, token in enumerate(told.with_logits) if stages[n] == stage and alive[token]]
            for stage in range(last + 1)
        ]
        order = [n for some in by_stage for n in some]
        logits = selected(told.found.logits, order) if self._auditor.watches else told.found.logits
        counts = self._counts(told, stopped, alive)
        passed = Passed(
            with_logits=[told.with_logits[n] for n in order],
            stopped=stopped,
            tokens=counts,
            rows=[0] * (last + 1),
            logits_of=[len(some) for some in by_stage],
            gated=[0] * last,
            ends_piece=[0] * last,
            seconds=[0.0] * (last + 1),
            gate_seconds=[0.0] * last,
            logits=logits,
            states=told.found.states,
            drawn=None,
        )
        for stage, count in enumerate(counts):
            told.decoder.block_calls.spare(
                self._plan.start(stage), self._plan.stop(stage), len(told.tokens) - count
            )
        for row, result in run.results.items():
            if row.sequence.status is Status.RUNNING:
                result.pairs = result.passes = 0  # counted anew, by how far it went
        whole = WholeRun(self._plan, told.parts.parts, told.tokens, passed)
        whole.settle(run.results, self._held)
        asked = [told.tokens[token] for token in told.with_logits]
        tokens = [(*token, stage) for token, stage in zip(asked, stages, strict=True)]
        run.undrawn = [Undrawn(tokens, told.found.logits[: len(tokens)])]
        if self._auditor.watches:
            whole.audit(self._auditor, told.decoder, self._pages[run.tick.variant])

    def _counts(self, told: "_Unsettled", stopped: list[int], alive: list[bool]) -> list[int]:
        """Tokens that were there in each stage; those of an answer that has ended count in all of them."""
        entries = told.parts.tokens.entries
        return [
            sum(
                not lives or entry <= stage <= stop
                for lives, entry, stop in zip(alive, entries, stopped, strict=True)
            )
            for stage in range(self._plan.stages)
        ]


@dataclass(frozen=True, slots=True)
class _Unsettled:
    """A tick of which the device knows who left where, and the host not yet."""

    passes: DecidedPasses
    run: TickRun
    parts: PassParts
    tokens: list[tuple[Row, int]]
    with_logits: list[int]
    found: DecidedPass
    decoder: Decoder
    coming: Fetch

    def settle(self) -> None:
        """Wait for it and note it."""
        self.passes.settle(self, self.coming.wait().tolist())


def _takes_row(row: Row) -> bool:
    """Whether a row scores no text, asks no exit that drafts, and need not leave where it did before."""
    sequence = row.sequence
    if sequence.scoring or (sequence.drafter is not None and row.threshold is not None):
        return False
    return not row.positions or sequence.recorded_stage(row.positions[-1]) is None


def _stopped(told: _Unsettled, left_at: list[int], last: int) -> list[int]:
    """Behind which exit each token stopped, `last` for the model's end, -1 where it never came in."""
    rows, entries = told.parts.rows, told.parts.tokens.entries
    asks = told.parts.tokens.asks
    of_token = dict(zip(told.with_logits, left_at, strict=False))
    ends = [0]
    for count in rows.tokens:
        ends.append(ends[-1] + count)
    stopped: list[int] = []
    for (start, stop), kind in zip(pairwise(ends), rows.at_exits, strict=True):
        newest = stop - 1
        left = of_token[newest] if asks[newest] and kind != AtExit.STAYS else last
        stopped += [left if left == last or entry <= left else -1 for entry in entries[start:stop]]
    return stopped
