"""Turns a tick into tensors, runs its stages, asks the gates, samples.

It knows nothing of queues or of requests' lives: the scheduler says which rows run how far, the engine what follows.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.compression.kv_format import KVPages
from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.kernels.paged_batch import PagedBatch
from exeunt.server.request import SamplingParams
from exeunt.server.sampling import RowSampling, sample
from exeunt.server.scheduler import Row, Tick
from exeunt.server.sequence import Sequence
from exeunt.server.stages import StagePlan


@dataclass(frozen=True, slots=True)
class Draw:
    """A sampled token: its id, its log-probability under the raw logits, and the stage at whose end it left."""

    token: int
    logprob: float
    stage: int


@dataclass(frozen=True, slots=True)
class Score:
    """The log-probability of a given text's token at `position` + 1, and the stage at which the pass left."""

    position: int
    logprob: float
    stage: int


@dataclass(frozen=True, slots=True)
class RowResult:
    """What became of one row: `waiting` are the positions that go on to the next stage, empty when the pass is over."""

    row: Row
    waiting: list[int]
    draw: Draw | None = None
    scores: tuple[Score, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Sampler:
    """What the runner needs to draw a sequence's next token."""

    params: SamplingParams
    choice: int


@dataclass(slots=True, eq=False)
class _Part:
    """What is still on its way of one row: the positions that have not left."""

    row: Row
    positions: list[int]


@dataclass(slots=True, eq=False)
class _Batch:
    """The tokens of a tick that are still on their way, as tensors and by row."""

    parts: list[_Part]
    geometry: PagedBatch
    hidden: Tensor  # [tokens, hidden]

    def tokens(self) -> list[tuple[Row, int]]:
        """The row and position of each token of the tensors."""
        return [(part.row, position) for part in self.parts for position in part.positions]


def _nothing_left(batch: _Batch) -> _Batch:
    return _Batch([], batch.geometry, batch.hidden[:0])


class Runner:
    """Runs ticks on one device. Holds the page arena and the hidden states of rows that wait between stages.

    `on_stages` is told of every run of stages, from where rows entered to the next gate (or the tick's end): which
    stages, the seconds they took (the tick's set-up with the first, its draws with the last), the rows that entered.
    """

    def __init__(
        self,
        model: LoadedModel,
        plan: StagePlan,
        arena: Tensor,
        page_bytes: int,
        on_stages: Callable[[range, float, int], None],
    ) -> None:
        self._model = model
        self._on_stages = on_stages
        self._plan = plan
        self._device = model.device
        self._pages = {v: KVPages(model.kv_layout(v, page_bytes), arena) for v in model.variants}
        self._samplers: dict[Sequence, Sampler] = {}
        self._hidden: dict[Sequence, Tensor] = {}  # states of rows between stages

    def page_tokens(self, variant: Variant) -> int:
        """Tokens that one page holds in this variant's layout."""
        return self._pages[variant].layout.page_tokens

    @property
    def holds_nothing(self) -> bool:
        """Whether no sequence is known and no state is kept."""
        return not self._samplers and not self._hidden

    def enter(self, sequence: Sequence, sampler: Sampler) -> None:
        """Remember how a sequence's tokens are drawn."""
        self._samplers[sequence] = sampler

    def forget_states(self, sequence: Sequence) -> None:
        """Drop the states of a preempted sequence."""
        self._hidden.pop(sequence, None)

    def leave(self, sequence: Sequence) -> None:
        """Forget a finished sequence."""
        self.forget_states(sequence)
        self._samplers.pop(sequence, None)

    @torch.inference_mode()
    def run(self, tick: Tick) -> list[RowResult]:
        """Run a tick's stages for its rows and say what became of each, in order.

        Tokens that leave at an exit on the way get their deeper keys and values there and drop out of the batch; what
        is left after the tick's last stage, where that is not the model's last, waits with its state.
        """
        began = time.perf_counter()
        decoder = self._model.decoder(tick.variant)
        batch = self._gather(tick, decoder)
        outputs = _Outputs()
        stage = tick.first_stage
        while batch.parts:
            boundary, rows = self._next_boundary(tick, batch, stage), len(batch.parts)
            batch = self._run_stages(tick, batch, stage, boundary, outputs)
            if not batch.parts:
                self._draw(outputs)
            ended = time.perf_counter()
            self._on_stages(range(stage, boundary + 1), ended - began, rows)
            began, stage = ended, boundary + 1
        return [outputs.result(row) for row in tick.rows]

    def _run_stages(
        self, tick: Tick, batch: _Batch, stage: int, boundary: int, outputs: "_Outputs"
    ) -> _Batch:
        """Run stages `stage` to `boundary` in one piece and say what is left to be run in this tick."""
        decoder, pages = self._model.decoder(tick.variant), self._pages[tick.variant]
        first, stop = self._plan.start(stage), self._plan.stop(boundary)
        batch.hidden = decoder.run_blocks(batch.hidden, batch.geometry, pages, first, stop)
        if boundary == self._plan.last:
            self._finish(decoder, batch, outputs)
            return _nothing_left(batch)
        batch = self._after_exit(boundary, decoder, pages, batch, outputs)
        if boundary == tick.last_stage:
            self._park(batch, outputs)
            return _nothing_left(batch)
        return batch

    def _next_boundary(self, tick: Tick, batch: _Batch, stage: int) -> int:
        """How far to run before asking a gate: where no row may leave, to the end of the tick."""
        return stage if any(part.row.may_leave for part in batch.parts) else tick.last_stage

    def _gather(self, tick: Tick, decoder: Decoder) -> _Batch:
        parts = [_Part(row, row.positions) for row in tick.rows]
        geometry = self._geometry(parts)
        if tick.first_stage == 0:
            ids = [row.sequence.tokens[p] for row in tick.rows for p in row.positions]
            return _Batch(parts, geometry, decoder.embed(self._ints(ids), geometry.positions))
        states = [self._hidden.pop(row.sequence) for row in tick.rows]
        return _Batch(parts, geometry, states[0] if len(states) == 1 else torch.cat(states))

    def _geometry(self, parts: Items[_Part]) -> PagedBatch:
        positions = [p for part in parts for p in part.positions]
        slots = [part.row.sequence.table.slot(p) for part in parts for p in part.positions]
        starts = np.fromiter(accumulate((len(part.positions) for part in parts), initial=0), dtype=np.int32)
        used = [part.positions[-1] // part.row.sequence.table.page_tokens + 1 for part in parts]
        tables = np.zeros((len(parts), max(used)), dtype=np.int32)
        for index, (part, count) in enumerate(zip(parts, used, strict=True)):
            tables[index, :count] = part.row.sequence.table.pages[:count]
        places = self._ints([positions, slots])
        return PagedBatch(
            positions=places[0],
            slots=places[1],
            query_starts=torch.from_numpy(starts).to(self._device),
            page_tables=torch.from_numpy(tables).to(self._device),
            max_context=max(part.positions[-1] for part in parts) + 1,
        )

    def _ints(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.int64)).to(self._device)

    def _finish(self, decoder: Decoder, batch: _Batch, outputs: "_Outputs") -> None:
        """The last stage: the model's own head for every token that is wanted."""
        tokens = batch.tokens()
        wanted = [
            i for i, (row, p) in enumerate(tokens) if row.sequence.scoring or row.sequence.yields_token((p,))
        ]
        if not wanted:
            return
        states = batch.hidden if len(wanted) == len(tokens) else batch.hidden[self._ints(wanted)]
        self._emit([tokens[i] for i in wanted], decoder.head(states), self._plan.last, outputs)

    def _after_exit(
        self, stage: int, decoder: Decoder, pages: KVPages, batch: _Batch, outputs: "_Outputs"
    ) -> _Batch:
        """A stage has ended in an exit: what is left of the batch when those that leave there are gone."""
        tokens, gated, left = batch.tokens(), [], set()
        for index, (row, position) in enumerate(tokens):
            if row.sequence.recorded_stage(position) == stage:
                left.add(index)
            elif row.sequence.asks_gate(position):
                gated.append(index)
        if gated:
            left.update(self._gate(stage, decoder, batch.hidden, tokens, gated, outputs))
        if not left:
            return batch
        self._propagate(stage, decoder, pages, batch, sorted(left))
        return self._without(batch, left)

    def _gate(
        self,
        stage: int,
        decoder: Decoder,
        hidden: Tensor,
        tokens: list[tuple[Row, int]],
        gated: list[int],
        outputs: "_Outputs",
    ) -> list[int]:
        """Ask the exit's gate about the tokens `gated`; emit those that leave and say which they are."""
        states = hidden if len(gated) == hidden.shape[0] else hidden[self._ints(gated)]
        thresholds = [tokens[i][0].sequence.exits.threshold for i in gated]
        asked = torch.from_numpy(np.array(thresholds, dtype=np.float32)).to(self._device)
        gate = self._model.exits[stage].gate(states, asked, decoder.project_exit)
        leaves, projected = gate.leaves.tolist(), gate.projected.tolist()
        chosen = [number for number, index in enumerate(projected) if leaves[index]]
        if not chosen:
            return []
        leaving = [gated[projected[number]] for number in chosen]
        logits = gate.logits if len(chosen) == len(projected) else gate.logits[self._ints(chosen)]
        self._emit([tokens[i] for i in leaving], logits, stage, outputs)
        return leaving

    def _propagate(
        self, stage: int, decoder: Decoder, pages: KVPages, batch: _Batch, left: list[int]
    ) -> None:
        """Write the deeper blocks' keys and values of tokens that leave, from their state at the exit."""
        hidden, geometry = batch.hidden, batch.geometry
        if len(left) < hidden.shape[0]:
            index = self._ints(left)
            hidden = hidden[index]
            # nothing attends here, so whose rows the tokens are does not matter
            geometry = replace(geometry, positions=geometry.positions[index], slots=geometry.slots[index])
        decoder.project_kv(hidden, geometry, pages, self._plan.stop(stage), self._plan.blocks)

    def _without(self, batch: _Batch, left: set[int]) -> _Batch:
        """The batch without the tokens `left`."""
        if batch.geometry.tokens == batch.geometry.rows:  # one token a row: a decode step
            staying = [i for i in range(len(batch.parts)) if i not in left]
            if not staying:
                return _nothing_left(batch)
            index = self._ints(staying)
            return _Batch([batch.parts[i] for i in staying], batch.geometry.take(index), batch.hidden[index])
        parts: list[_Part] = []
        stay: list[int] = []
        token = 0
        for part in batch.parts:
            kept = [(i, p) for i, p in enumerate(part.positions, start=token) if i not in left]
            token += len(part.positions)
            stay += [i for i, _ in kept]
            if kept:
                parts.append(_Part(part.row, [p for _, p in kept]))
        if not parts:
            return _nothing_left(batch)
        return _Batch(parts, self._geometry(parts), batch.hidden[self._ints(stay)])

    def _park(self, batch: _Batch, outputs: "_Outputs") -> None:
        """Keep the states of what waits for the next stage."""
        token = 0
        for part in batch.parts:
            self._hidden[part.row.sequence] = batch.hidden[token : token + len(part.positions)]
            outputs.waiting[part.row] = part.positions
            token += len(part.positions)

    def _emit(self, wanted: list[tuple[Row, int]], logits: Tensor, stage: int, outputs: "_Outputs") -> None:
        """Note what the next token of rows that decode is drawn from, and look up the given one of rows that score."""
        scored = [i for i, (row, _) in enumerate(wanted) if row.sequence.scoring]
        drawn = [i for i, (row, _) in enumerate(wanted) if not row.sequence.scoring]
        if scored:
            self._score(
                [wanted[i] for i in scored],
                logits if not drawn else logits[self._ints(scored)],
                stage,
                outputs,
            )
        if drawn:
            rows = logits if not scored else logits[self._ints(drawn)]
            outputs.undrawn.append(([wanted[i][0] for i in drawn], rows, stage))

    def _score(self, wanted: list[tuple[Row, int]], logits: Tensor, stage: int, outputs: "_Outputs") -> None:
        targets = self._ints([row.sequence.tokens[position + 1] for row, position in wanted])
        logprobs = logits.float().log_softmax(dim=-1).gather(1, targets[:, None]).flatten().tolist()
        for (row, position), logprob in zip(wanted, logprobs, strict=True):
            outputs.scores.setdefault(row, []).append(Score(position, logprob, stage))

    def _draw(self, outputs: "_Outputs") -> None:
        """Sample the next tokens of all rows that left in this tick, wherever they did, in one go."""
        if not outputs.undrawn:
            return
        rows = [row for some, _, _ in outputs.undrawn for row in some]
        stages = [stage for some, _, stage in outputs.undrawn for _ in some]
        parts = [logits for _, logits, _ in outputs.undrawn]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        asks = []
        for row in rows:
            sequence, sampler = row.sequence, self._samplers[row.sequence]
            asks.append(RowSampling(sampler.params, sampler.choice, sequence.generated, sequence.tokens))
        drawn = sample(logits, asks, self._model.spec.eos_token_ids)
        for row, stage, token, logprob, error in zip(
            rows, stages, drawn.ids, drawn.logprobs, drawn.errors, strict=True
        ):
            if error is not None:
                outputs.errors[row] = error
            else:
                outputs.draws[row] = Draw(token, logprob, stage)


class _Outputs:
    """What the rows of a tick yielded."""

    def __init__(self) -> None:
        self.undrawn: list[
            tuple[list[Row], Tensor, int]
        ] = []  # rows, their logits [rows, vocab], where they left
        self.draws: dict[Row, Draw] = {}
        self.scores: dict[Row, list[Score]] = {}
        self.errors: dict[Row, str] = {}
        self.waiting: dict[Row, list[int]] = {}

    def result(self, row: Row) -> RowResult:
        return RowResult(
            row,
            self.waiting.get(row, []),
            self.draws.get(row),
            tuple(self.scores.get(row, ())),
            self.errors.get(row),
        )
