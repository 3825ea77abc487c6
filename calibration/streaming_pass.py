"""The one pass of the fit and select splits through a model: each block quantised, then run as it will be deployed.

Of the model in full precision there is one block in memory at a time. A block's weights are read; where GPTQ rounds
them, part of the fit split runs through it in full precision from the states that the deployed blocks in front gave,
which shows what each layer's inputs will be like; its layers are quantised; all tokens run through the block as
deployed, and visitors look on. All layers of a block are rounded after one run of it in full precision: to round one
and look again at what the next is then given takes four runs and was found to buy next to nothing
(`docs/calibration.md`).

The pass can be taken up again behind the last finished block: a block is finished when the journal has its INT4 tensors
and what visitors learned. States pass between two arrays in turn, so that those in front of a block are whole until the
block is finished.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exeunt.calibration.activations import BlockVisitor, Scratch, digest
from exeunt.calibration.block_runner import BlockRunner
from exeunt.calibration.hessians import SecondMoments, recording
from exeunt.calibration.journal import Entry, Journal, NoJournal
from exeunt.calibration.sequence_batch import SequenceBatch, batches
from exeunt.calibration.weights_int4 import (
    Int4Plan,
    Int4Weights,
    QuantisedLinear,
    check_group_size,
    quantize_linear,
)
from exeunt.compression.block import Block
from exeunt.compression.block_weights import read_block, read_embedding, read_frame
from exeunt.compression.bundle_weights import int4_tensors
from exeunt.compression.checkpoint_names import linear_names, linear_shapes
from exeunt.compression.weights import WeightSource
from exeunt.kernels.int4_linear import Int4Weight

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Streamed:
    """What the pass leaves: INT4 weights where they were asked for, and the states [tokens, hidden] behind the last
    block on the CPU, tokens in the order of the rows that passed."""

    int4: Int4Weights | None
    final: Tensor


def stream_model(
    weights: WeightSource,
    runner: BlockRunner,
    rows: Sequence[Tensor],
    fit_rows: int,
    plan: Int4Plan | None,
    visitors: Sequence[BlockVisitor],
    scratch: Scratch,
    journal: Journal,
    *,
    batch_tokens: int,
    advance: Advance = lambda _tokens: None,
) -> Streamed:
    """Pass `rows` (each [n] int64), of which the first `fit_rows` are the fit split's, through the model of `weights`.

    `runner` says the model's shape, device, dtype, and KV format; `plan` how weights are quantised, None for not at all
    (the full-precision model then passes, a block at a time). `scratch` keeps the states; with a `journal` other than
    NoJournal it must outlive the process like that. `advance` is told tokens, `planned_tokens` in all. Raises
    CalibrationError where INT4 cannot hold a weight, and WeightError for what is wrong with the checkpoint's.
    """
    if plan is not None:
        check_group_size(runner.spec, plan.group_size)
    return _Pass(
        weights, runner, rows, fit_rows, plan, visitors, scratch, journal, batch_tokens, advance
    ).run()


def planned_tokens(rows: Sequence[Tensor], fit_rows: int, plan: Int4Plan | None, blocks: int) -> int:
    """What `stream_model` tells its `advance` in all: tokens, once for each time that they pass a block."""
    looked_at = spread_rows(rows[:fit_rows], plan.hessian_tokens) if _looks(plan) and plan is not None else []
    return blocks * (sum(map(len, rows)) + sum(len(rows[number]) for number in looked_at))


def spread_rows(rows: Sequence[Tensor], tokens: int) -> list[int]:
    """The numbers of rows that hold about `tokens` tokens in all, evenly over `rows`; ascending, at least one."""
    total = sum(map(len, rows))
    chosen: list[int] = []
    passed = held = 0
    for number, row in enumerate(rows):
        passed += len(row)
        if total <= tokens or held + len(row) / 2 <= tokens * passed / total:
            chosen.append(number)
            held += len(row)
    return chosen or [0]


def _looks(plan: Int4Plan | None) -> bool:
    return plan is not None and plan.rounding == "gptq"


class _States:
    """All tokens' states, in two arrays that take turns."""

    def __init__(self, tokens: int, runner: BlockRunner, scratch: Scratch) -> None:
        self._scratch = scratch
        width, dtype = runner.spec.hidden_size, runner.dtype
        self._arrays = [scratch.array(tokens, width, dtype, self._name(turn)) for turn in range(2)]

    def before(self, block: int) -> Tensor:
        """The states in front of `block`."""
        return self._arrays[block % 2]

    def keep(self, block: int) -> str:
        """Force the states in front of `block` onto the disk; returns their digest."""
        self._scratch.sync(self._name(block % 2))
        return digest(self.before(block))

    @staticmethod
    def _name(turn: int) -> str:
        return f"passing-{turn}"


class _Pass:
    """The pass of `stream_model` under way."""

    def __init__(
        self,
        weights: WeightSource,
        runner: BlockRunner,
        rows: Sequence[Tensor],
        fit_rows: int,
        plan: Int4Plan | None,
        visitors: Sequence[BlockVisitor],
        scratch: Scratch,
        journal: Journal,
        batch_tokens: int,
        advance: Advance,
    ) -> None:
        self._weights, self._runner, self._plan = weights, runner, plan
        self._visitors, self._journal, self._advance = visitors, journal, advance
        self._groups = list(batches(rows, batch_tokens, runner.device))
        self._tokens = sum(group.tokens for group in self._groups)
        self._states = _States(self._tokens, runner, scratch)
        self._looked_at = (
            _parts_of(rows, spread_rows(rows[:fit_rows], plan.hessian_tokens), batch_tokens, runner.device)
            if plan is not None and _looks(plan)
            else []
        )
        self._linears: dict[tuple[int, str], QuantisedLinear] = {}

    def run(self) -> Streamed:
        """Everything that the journal does not know."""
        blocks = self._runner.spec.blocks
        begin = self._resumed()
        if begin == 0:
            self._begin_anew()
        for index in range(begin, blocks):
            block = self._deployed(index)
            self._through(block)
            del block
            for visitor in self._visitors:
                visitor.finish(index)
            self._finish(index)
        final = self._states.before(blocks)
        return Streamed(None if self._plan is None else self._int4(self._plan), final)

    def _begin_anew(self) -> None:
        """Put the states in front of block 0 in their place; nothing is known of any block."""
        self._linears.clear()
        for visitor in self._visitors:
            visitor.forget()
        runner, states, start = self._runner, self._states.before(0), 0
        embedding = read_embedding(runner.spec, self._weights.shared(), runner.device, runner.dtype)
        for group in self._groups:
            states[start : start + group.tokens] = embedding.embed(group.token_ids, group.positions)
            start += group.tokens

    def _deployed(self, index: int) -> Block:
        """Block `index` as it will be served, its layers quantised where a plan says so."""
        runner, tensors = self._runner, self._weights.block(index)
        place, dtype, spec = runner.device, runner.dtype, runner.spec
        plan = self._plan
        if plan is None:
            return read_block(spec, index, tensors, place, dtype)
        if _looks(plan):
            full = read_block(spec, index, tensors, place, dtype)
            moments, frame = self._moments(full), full.frame
            del full
        else:
            moments, frame = {}, read_frame(spec, index, tensors, place, dtype)
        own: dict[tuple[int, str], Int4Weight] = {}
        for name in linear_names(spec):
            seen = moments.pop(name, None)
            layer = quantize_linear(
                tensors[f"{name}.weight"],
                plan,
                None if seen is None else seen.sum,
                place,
                f"Layer {name} of block {index}",
            )
            self._linears[index, name] = layer
            own[0, name] = layer.weight
        packed = {name.removeprefix("blocks.0."): tensor for name, tensor in int4_tensors(own).items()}
        return read_block(spec, index, packed, place, dtype, int4_group_size=plan.group_size, frame=frame)

    def _moments(self, full: Block) -> dict[str, SecondMoments]:
        """What the layers of a full-precision block are given, from the deployed states in front of it."""
        observed, moments = recording(full)
        before = self._states.before(full.index)
        for batch, tokens in self._looked_at:
            self._runner.run(observed, before[tokens].to(self._runner.device), batch)
            self._advance(batch.tokens)
        return moments

    def _through(self, block: Block) -> None:
        """All tokens through `block`, with the visitors looking on."""
        index, start = block.index, 0
        before, after = self._states.before(index), self._states.before(index + 1)
        for group in self._groups:
            tokens = slice(start, start + group.tokens)
            given = before[tokens].to(self._runner.device)
            made = self._runner.run(block, given, group)
            for visitor in self._visitors:
                visitor.see(index, tokens, given, made)
            after[tokens] = made
            self._advance(group.tokens)
            start += group.tokens

    def _finish(self, index: int) -> None:
        """Tell the journal that `index` is finished."""
        if isinstance(self._journal, NoJournal):
            return
        tensors: dict[str, Tensor] = {}
        learned: list[Any] = []
        for number, visitor in enumerate(self._visitors):
            own, record = visitor.record(index)
            tensors |= {f"{_visitor(number)}{name}": tensor for name, tensor in own.items()}
            learned.append(record)
        layers = {name: layer for (block, name), layer in self._linears.items() if block == index}
        for name, layer in layers.items():
            tensors |= _tensors_of(name, layer)
        record = {
            "states": self._states.keep(index + 1),
            "visitors": learned,
            "errors": {name: [layer.relative_error, layer.output_error] for name, layer in layers.items()},
        }
        self._journal.write(_block_entry(index), tensors, record)
        written = self._journal.read(_block_entry(index))
        if (
            written is not None
        ):  # views of its file: the model's layers need not lie in memory beside their packed form
            for name, errors in record["errors"].items():
                self._linears[index, name] = self._layer(name, written[0], errors)

    def _resumed(self) -> int:
        """How many blocks are finished: what is known of them is taken over."""
        entries: list[Entry] = []
        for index in range(self._runner.spec.blocks):
            entry = self._journal.read(_block_entry(index))
            if entry is None:
                break
            entries.append(entry)
        done = len(entries)
        if done == 0 or entries[-1][1]["states"] != digest(self._states.before(done)):
            return 0
        for index, (tensors, record) in enumerate(entries):
            for number, visitor in enumerate(self._visitors):
                own = _with_prefix(tensors, _visitor(number))
                if not visitor.restore(index, (own, record["visitors"][number])):
                    return 0
            for name, errors in record["errors"].items():
                self._linears[index, name] = self._layer(name, tensors, errors)
        looked_at = sum(batch.tokens for batch, _ in self._looked_at)
        self._advance(done * (self._tokens + looked_at))
        return done

    def _layer(
        self, name: str, tensors: Mapping[str, Tensor], errors: Sequence[float | None]
    ) -> QuantisedLinear:
        """A layer from the journal's tensors."""
        relative, output = errors
        own = _with_prefix(tensors, f"{name}.")
        shape = (self._runner.spec.vocab_size, self._runner.spec.hidden_size)
        out_features, in_features = shape if name == _OUTPUT else linear_shapes(self._runner.spec)[name]
        size = 0 if self._plan is None else self._plan.group_size
        weight = Int4Weight(own["codes"], own["scales"], own["offsets"], size, in_features, out_features)
        return QuantisedLinear(weight, relative or 0.0, output)

    def _int4(self, plan: Int4Plan) -> Int4Weights:
        """All layers, the output matrix quantised last."""
        output = self._output(plan)
        return Int4Weights(
            {key: layer.weight for key, layer in self._linears.items()},
            output.weight,
            plan.group_size,
            {key: layer.relative_error for key, layer in self._linears.items()},
            {
                key: layer.output_error
                for key, layer in self._linears.items()
                if layer.output_error is not None
            },
            plan.rounding,
        )

    def _output(self, plan: Int4Plan) -> QuantisedLinear:
        """The output matrix, for the states that the last block gives the final norm."""
        entry = self._journal.read(_OUTPUT)
        if entry is not None:
            return self._layer(_OUTPUT, entry[0], entry[1])
        runner, shared = self._runner, self._weights.shared()
        moments: SecondMoments | None = None
        if _looks(plan):
            norm = read_embedding(runner.spec, shared, runner.device, runner.dtype).final_norm
            final = self._states.before(runner.spec.blocks)
            moments = SecondMoments(runner.spec.hidden_size, runner.device)
            for _, tokens in self._looked_at:
                moments.add(norm(final[tokens].to(runner.device)))
        matrix = shared["embedding.tokens" if runner.spec.tied else "output.weight"]
        layer = quantize_linear(
            matrix, plan, None if moments is None else moments.sum, runner.device, "The output matrix"
        )
        self._journal.write(_OUTPUT, _tensors_of(_OUTPUT, layer), [layer.relative_error, layer.output_error])
        return layer


_OUTPUT = "output"


def _block_entry(index: int) -> str:
    return f"block-{index}"


def _visitor(number: int) -> str:
    return f"visitor-{number}."


def _tensors_of(name: str, layer: QuantisedLinear) -> dict[str, Tensor]:
    weight = layer.weight
    parts = {"codes": weight.codes, "scales": weight.scales, "offsets": weight.offsets}
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _parts_of(
    rows: Sequence[Tensor], numbers: Sequence[int], batch_tokens: int, device: torch.device
) -> list[tuple[SequenceBatch, Tensor]]:
    """The rows of `numbers` in batches, each with its tokens' places [T] int64 among those of all `rows`."""
    starts = torch.tensor([0, *map(len, rows)]).cumsum(0).tolist()
    places = torch.cat([torch.arange(starts[each], starts[each + 1]) for each in numbers])
    parts, start = [], 0
    for batch in batches([rows[each] for each in numbers], batch_tokens, device):
        parts.append((batch, places[start : start + batch.tokens]))
        start += batch.tokens
    return parts
