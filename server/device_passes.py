"""Ticks whose exits a GPU decides by itself: the host hears of it with the tokens, when all has run."""

from collections.abc import Mapping

import torch
from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.compression.device_pass import PassExit, PassInputs
from exeunt.compression.graph_pool import ROWS, TOKENS
from exeunt.compression.kv_format import KVPages
from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.kernels.model_pass import AtExit
from exeunt.server.auditor import Auditor
from exeunt.server.device_inputs import DeviceInputs
from exeunt.server.device_run import DeviceRun
from exeunt.server.held_states import HeldStates
from exeunt.server.pass_parts import PassParts, runs_whole
from exeunt.server.stages import StagePlan
from exeunt.server.tick import Tick
from exeunt.server.tick_run import Piece, TickRun, Undrawn


class DevicePasses:
    """Takes ticks of one engine through all stages in one graph, without asking who leaves where."""

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
        """Whether the tick runs whole, asks an exit of the approximate mode, and is of no more than graphs may have.

        What asks the exit that drafts goes by stages: whether that pays is told by what its stages and its gate take.
        """
        if len(tick.rows) > ROWS[-1] or tick.tokens > TOKENS[-1]:
            return False
        asking = [row.sequence for row in tick.rows if row.threshold is not None]
        drafts = any(sequence.drafter is not None for sequence in asking)
        return bool(asking) and not drafts and runs_whole(tick, self._plan)

    def run(self, run: TickRun, drawn: Tensor | None = None, order: list[int] | None = None) -> bool:
        """Take a tick's rows up to their logits; false where no captured graph has room: nothing has been done then.

        Where the host does not know the rows' tokens yet, row i's is `drawn[order[i]]`. Until the run's exits are noted
        all rows stand as if they had gone to the model's end.
        """
        variant = run.tick.variant
        decoder, pages = self._model.decoder(variant), self._pages[variant]
        parts = PassParts()
        for row in run.tick.rows:
            parts.add(row, self._asked)
        waiting = [i for i, entry in enumerate(parts.tokens.entries) if entry]
        beside = [*(parts.tokens.ids if order is None else order), *waiting]
        inputs = DeviceInputs.of(parts, pages.layout.page_tokens, self._model.device, beside)
        if inputs is None:
            return False
        own = len(beside) - len(waiting)
        ids, places = inputs.beside[:own], inputs.beside[own:]
        if drawn is not None:
            ids = drawn.index_select(0, ids).long()
        hidden = decoder.embed(ids, inputs.batch.positions)
        if waiting:
            held = [s for row in run.tick.rows for s in self._held.waiting(row.sequence)]
            hidden.index_copy_(0, places, torch.cat(held))
        exits = self._exits(decoder, parts)
        asked = PassInputs(inputs.layout, inputs.numbers, exits, parts.leaves_for_good, self._plan.last)
        results = decoder.run_pass(hidden, inputs.batch, pages, asked)
        if results is None:
            return False
        run.entering.clear()
        run.piece = Piece(range(self._plan.stages), len(parts.parts), len(parts.tokens.positions))
        for row in run.tick.rows:
            if row.positions:
                run.results[row].count(row.positions, self._plan.blocks)
        tokens, with_logits = parts.all_tokens, inputs.with_logits
        undrawn = [(*tokens[token], self._plan.last) for token in with_logits]
        run.undrawn.append(Undrawn(undrawn, results.logits[: len(undrawn)]))
        run.pending_exits = DeviceRun(
            self._plan, parts, tokens, with_logits, results, decoder, pages, self._held, self._auditor
        )
        return True

    def _exits(self, decoder: Decoder, parts: PassParts) -> tuple[PassExit, ...]:
        """The exits at which a token may leave or come in.

        Where rows wait at exits others come in at one time and not at another: one graph does for both.
        """
        entries, asks = set(parts.tokens.entries), set(parts.tokens.asks)
        kinds = zip(parts.parts, parts.rows.at_exits, strict=True)
        waits = any(part.row.threshold is not None and kind != AtExit.LEAVES for part, kind in kinds)
        found = []
        for index in range(self._plan.last):
            asked = any(bits >> index & 1 for bits in asks)
            takes_in = index + 1 in entries or (asked and waits)
            if asked or takes_in:
                steps = self._model.exits[index].steps
                depth = self._plan.stop(index)
                found.append(PassExit(index, depth, asked, takes_in, steps, decoder.project_exit))
        return tuple(found)
