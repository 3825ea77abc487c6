"""Turns a tick into tensors, runs its stages, asks the gates, samples; knows nothing of queues or requests' lives."""

from collections.abc import Sequence as Items
from dataclasses import dataclass

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


@dataclass(slots=True)
class _Batch:
    """A tick's tokens as tensors, and where each came from."""

    geometry: PagedBatch
    hidden: Tensor  # [tokens, hidden]


class Runner:
    """Runs ticks on one device. Holds the page arena and the hidden states of rows that wait between stages."""

    def __init__(self, model: LoadedModel, plan: StagePlan, arena: Tensor, page_bytes: int) -> None:
        self._model = model
        self._plan = plan
        self._device = model.device
        self._pages = {v: KVPages(model.kv_layout(v, page_bytes), arena) for v in model.variants}
        self._samplers: dict[Sequence, Sampler] = {}
        self._hidden: dict[Sequence, Tensor] = {}  # states of rows between stages
        self._carried: tuple[tuple[Row, ...], _Batch] | None = (
            None  # the last tick's batch, if it moved on whole
        )

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
        self._carried = None

    def leave(self, sequence: Sequence) -> None:
        """Forget a finished sequence."""
        self.forget_states(sequence)
        self._samplers.pop(sequence, None)

    @torch.inference_mode()
    def run(self, tick: Tick) -> list[RowResult]:
        """Run a tick's stages for its rows and say what became of each, in order."""
        decoder = self._model.decoder(tick.variant)
        pages = self._pages[tick.variant]
        batch = self._gather(tick, decoder)
        first, stop = self._plan.start(tick.first_stage), self._plan.stop(tick.last_stage)
        batch.hidden = decoder.run_blocks(batch.hidden, batch.geometry, pages, first, stop)
        if tick.last_stage == self._plan.last:
            self._carried = None
            return self._finish(tick, decoder, batch.hidden)
        return self._leave_or_go_on(tick, decoder, pages, batch)

    def _gather(self, tick: Tick, decoder: Decoder) -> _Batch:
        carried, self._carried = self._carried, None
        if carried is not None and tick.first_stage > 0 and carried[0] == tick.rows:
            for row in tick.rows:
                self._hidden.pop(row.sequence)
            return carried[1]
        geometry = self._geometry(tick.rows)
        if tick.first_stage == 0:
            ids = [row.sequence.tokens[p] for row in tick.rows for p in row.positions]
            return _Batch(geometry, decoder.embed(self._ints(ids), geometry.positions))
        states = [self._hidden.pop(row.sequence) for row in tick.rows]
        return _Batch(geometry, states[0] if len(states) == 1 else torch.cat(states))

    def _geometry(self, rows: Items[Row]) -> PagedBatch:
        positions = [p for row in rows for p in row.positions]
        slots = [row.sequence.table.slot(p) for row in rows for p in row.positions]
        starts = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum([len(row.positions) for row in rows], out=starts[1:])
        used = [row.positions[-1] // row.sequence.table.page_tokens + 1 for row in rows]
        tables = np.zeros((len(rows), max(used)), dtype=np.int32)
        for index, (row, count) in enumerate(zip(rows, used, strict=True)):
            tables[index, :count] = row.sequence.table.pages[:count]
        return PagedBatch(
            positions=self._ints(positions),
            slots=self._ints(slots),
            query_starts=torch.from_numpy(starts).to(self._device),
            page_tables=torch.from_numpy(tables).to(self._device),
            max_context=max(row.positions[-1] for row in rows) + 1,
        )

    def _ints(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _finish(self, tick: Tick, decoder: Decoder, hidden: Tensor) -> list[RowResult]:
        """The last stage: the model's own head for every token that is wanted."""
        wanted: list[tuple[Row, int]] = []
        indices: list[int] = []
        token = 0
        for row in tick.rows:
            if row.sequence.scoring:
                wanted += [(row, p) for p in row.positions]
                indices += range(token, token + len(row.positions))
            token += len(row.positions)
            if row.yields_token:
                wanted.append((row, row.positions[-1]))
                indices.append(token - 1)
        outputs = _Outputs()
        if wanted:
            whole = len(indices) == hidden.shape[0]
            logits = decoder.head(hidden if whole else hidden[self._ints(indices)])
            outputs = self._emit(wanted, logits, tick.last_stage)
        return [outputs.result(row, []) for row in tick.rows]

    def _leave_or_go_on(self, tick: Tick, decoder: Decoder, pages: KVPages, batch: _Batch) -> list[RowResult]:
        """A stage that ends in an exit: tokens that leave get their deeper keys and values, the others wait."""
        stage = tick.last_stage
        tokens = [(row, p) for row in tick.rows for p in row.positions]
        recorded = [row.sequence.recorded_stage(p) if row.may_leave else None for row, p in tokens]
        gated = [i for i, (row, _) in enumerate(tokens) if row.may_leave and recorded[i] is None]
        left = {i for i, at in enumerate(recorded) if at == stage}
        outputs = _Outputs()
        if gated:
            outputs = self._gate(stage, decoder, batch.hidden, tokens, gated, left)
        if left:
            self._propagate(stage, decoder, pages, batch, sorted(left))
        return self._go_on(tick, batch, left, outputs)

    def _gate(
        self,
        stage: int,
        decoder: Decoder,
        hidden: Tensor,
        tokens: list[tuple[Row, int]],
        gated: list[int],
        left: set[int],
    ) -> "_Outputs":
        """Ask the exit's gate about the tokens `gated`, add those that leave to `left`, and emit them."""
        states = hidden if len(gated) == hidden.shape[0] else hidden[self._ints(gated)]
        thresholds = [tokens[i][0].sequence.exits.threshold for i in gated]
        asked = torch.tensor(thresholds, dtype=torch.float32, device=self._device)
        gate = self._model.exits[stage].gate(states, asked, decoder.project)
        if gate.projected.numel() == 0:
            return _Outputs()
        leaves = gate.leaves[gate.projected]
        leaving = [gated[i] for i in gate.projected[leaves].tolist()]
        if not leaving:
            return _Outputs()
        left.update(leaving)
        logits = gate.logits if len(leaving) == gate.logits.shape[0] else gate.logits[leaves]
        return self._emit([tokens[i] for i in leaving], logits, stage)

    def _propagate(
        self, stage: int, decoder: Decoder, pages: KVPages, batch: _Batch, left: list[int]
    ) -> None:
        """Write the deeper blocks' keys and values of tokens that leave, from their state at the exit."""
        hidden, geometry = batch.hidden, batch.geometry
        if len(left) < hidden.shape[0]:
            index = self._ints(left)
            hidden = hidden[index]
            geometry = PagedBatch(
                positions=geometry.positions[index],
                slots=geometry.slots[index],
                query_starts=geometry.query_starts,
                page_tables=geometry.page_tables,
                max_context=geometry.max_context,
            )
        decoder.project_kv(hidden, geometry, pages, self._plan.stop(stage), self._plan.blocks)

    def _go_on(self, tick: Tick, batch: _Batch, left: set[int], outputs: "_Outputs") -> list[RowResult]:
        results: list[RowResult] = []
        token = 0
        for row in tick.rows:
            span = range(token, token + len(row.positions))
            token = span.stop
            stay = [i for i in span if i not in left] if left else list(span)
            if stay:
                states = batch.hidden[span.start : span.stop]
                kept = (
                    states if len(stay) == len(span) else states[self._ints([i - span.start for i in stay])]
                )
                self._hidden[row.sequence] = kept
            results.append(outputs.result(row, [row.positions[i - span.start] for i in stay]))
        if not left:
            self._carried = (tick.rows, batch)
        return results

    def _emit(self, wanted: list[tuple[Row, int]], logits: Tensor, stage: int) -> "_Outputs":
        """Sample the next token of rows that decode, and look up the given one of rows that score."""
        outputs = _Outputs()
        scored = [i for i, (row, _) in enumerate(wanted) if row.sequence.scoring]
        drawn = [i for i, (row, _) in enumerate(wanted) if not row.sequence.scoring]
        if scored:
            rows = logits if not drawn else logits[self._ints(scored)]
            targets = self._ints([wanted[i][0].sequence.tokens[wanted[i][1] + 1] for i in scored])
            logprobs = rows.float().log_softmax(dim=-1).gather(1, targets[:, None]).flatten().tolist()
            for i, logprob in zip(scored, logprobs, strict=True):
                row, position = wanted[i]
                outputs.scores.setdefault(row, []).append(Score(position, logprob, stage))
        if drawn:
            rows = logits if not scored else logits[self._ints(drawn)]
            self._draw([wanted[i][0] for i in drawn], rows, stage, outputs)
        return outputs

    def _draw(self, rows: list[Row], logits: Tensor, stage: int, outputs: "_Outputs") -> None:
        asks = []
        for row in rows:
            sequence, sampler = row.sequence, self._samplers[row.sequence]
            asks.append(RowSampling(sampler.params, sampler.choice, sequence.generated, sequence.tokens))
        drawn = sample(logits, asks, self._model.spec.eos_token_ids)
        for index, row in enumerate(rows):
            error = drawn.errors[index]
            if error is not None:
                outputs.errors[row] = error
            else:
                outputs.draws[row] = Draw(drawn.ids[index], drawn.logprobs[index], stage)


class _Outputs:
    """What the rows of a tick yielded."""

    def __init__(self) -> None:
        self.draws: dict[Row, Draw] = {}
        self.scores: dict[Row, list[Score]] = {}
        self.errors: dict[Row, str] = {}

    def result(self, row: Row, waiting: list[int]) -> RowResult:
        return RowResult(
            row, waiting, self.draws.get(row), tuple(self.scores.get(row, ())), self.errors.get(row)
        )
