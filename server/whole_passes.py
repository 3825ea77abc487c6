"""Ticks that one native call takes through all blocks: which are such, and what is done for them."""

from collections.abc import Callable
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from exeunt.compression.kv_format import KVPages
from exeunt.compression.model import LoadedModel
from exeunt.compression.model_pass import ModelPass
from exeunt.compression.variant import Variant
from exeunt.kernels.model_pass import PassBatch, Passed
from exeunt.server.held_states import HeldStates
from exeunt.server.pass_parts import PassParts, runs_whole
from exeunt.server.request import ExitMode
from exeunt.server.row_sampling import PlainDraw, RowSampling, plain_draw, token_keys
from exeunt.server.sequence import Sequence
from exeunt.server.stages import StagePlan
from exeunt.server.tick import Tick
from exeunt.server.whole_run import WholeRun


class WholePasses:
    """The passes of a model's variants through all of their blocks at once, where the kernels have such."""

    def __init__(
        self, model: LoadedModel, plan: StagePlan, sampling: Callable[[Sequence, int], RowSampling]
    ) -> None:
        """`sampling` says how the token behind a sequence's position is drawn."""
        self._model, self._plan, self._sampling = model, plan, sampling
        self._asked = {
            mode: sum(1 << stage for stage in range(plan.last) if plan.asks(mode, stage))
            for mode in get_args(ExitMode)
        }
        self._passes: dict[Variant, ModelPass | None] = {}  # made when first asked for

    def of(self, tick: Tick, pages: KVPages) -> "WholePass | None":
        """The pass of a tick over these pages; None where it must go by stages.

        That is one that does not run whole, and one that the kernels do not take.
        """
        if not runs_whole(tick, self._plan):
            return None
        found = self._pass(tick.variant)
        if found is None:
            return None
        parts = PassParts(self._draw)
        for row in tick.rows:
            parts.add(row, self._asked[row.sequence.exits.mode])
        keys = token_keys(self._model.spec.vocab_size, self._model.device) if parts.draws else None
        batch = PassBatch(parts.tokens, parts.rows, keys)
        return WholePass(self._plan, found, pages, parts, batch) if found.takes(batch, pages) else None

    def _draw(self, sequence: Sequence, position: int) -> PlainDraw | None:
        spec = self._model.spec
        try:
            asked = self._sampling(sequence, position)
            return plain_draw(asked, spec.vocab_size, ends=bool(spec.eos_token_ids))
        except Exception:  # noqa: BLE001 - whose trouble it is shows when each is drawn alone
            return None

    def _pass(self, variant: Variant) -> ModelPass | None:
        if variant not in self._passes:
            self._passes[variant] = ModelPass.of(self._model.decoder(variant), self._model.exits)
        return self._passes[variant]


class WholePass(NamedTuple):
    """A tick that one call takes through all blocks."""

    plan: StagePlan
    model_pass: ModelPass
    pages: KVPages
    entering: PassParts
    batch: PassBatch

    def states(self, held: HeldStates) -> Tensor:
        """Room for the states [tokens, hidden]; those that wait behind an exit are copied to where they come in."""
        spec, dtype = self.model_pass.decoder.spec, self.model_pass.decoder.dtype
        states, start = torch.empty(self.batch.token_count, spec.hidden_size, dtype=dtype), 0
        for part in self.entering.parts:
            place = start
            for some in held.waiting(part.row.sequence) if part.row.sequence.pending else ():
                states[place : place + len(some)] = some
                place += len(some)
            start += len(part.positions)
        return states

    def run(self, states: Tensor) -> Passed:
        """Take all tokens through the blocks; `states` are overwritten."""
        return self.model_pass.run(states, self.batch, self.pages)

    def went(self, passed: Passed) -> WholeRun:
        """Where the rows' tokens went."""
        return WholeRun(self.plan, self.entering.parts, self.entering.all_tokens, passed)
