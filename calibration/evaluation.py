"""Every mode of a model on a held-out text, teacher-forced: its price in quality and what it saves, with intervals.

The reference is the full-precision full-depth model, or the least compressed variant that there is. Intervals are
bootstraps over blocks of text (`exeunt.calibration.bootstrap`), all modes on the same resamples.

Variants go one after another, the reference's first, whose last states are kept so that the others can be held against
it; an interrupted evaluation goes on at the variant where it stopped.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exeunt.calibration.bootstrap import Measure, block_difference, block_ratio, block_share, resamples
from exeunt.calibration.compute import ComputeCost
from exeunt.calibration.evaluation_table import EvaluationTable, Mode, ModeResult, TextColumn
from exeunt.calibration.journal import Journal, NoJournal
from exeunt.calibration.mode_pass import Outcome, VariantPass, mode_outcome, variant_pass
from exeunt.calibration.scored_text import ScoredBatch, ScoredText
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.calibration.token_figures import Reference, reference_of
from exeunt.compression.variant import KVFormat, Variant, WeightFormat

__all__ = ["WORTHWHILE", "EvaluationTable", "Measure", "Mode", "ModeResult", "TextColumn", "evaluate_modes"]

WORTHWHILE: Final = 0.10
"""An exit rate below this everywhere asks for one looser, uncertified row, so that the trade can be seen."""
_DISTRIBUTIONS: Final = 1 << 23
"""Elements of the reference's distributions over a batch, 32 MiB, unless a single row has more. Where full weights are
read anew for every batch, its width must not hang on the vocabulary: distributions are then made as they are needed."""
_STATES: Final = 1 << 26
"""Elements of the reference's last states that are kept: a longer text is evaluated part by part."""

Advance = Callable[[int], None]
Floats = NDArray[np.float64]
Family = tuple[WeightFormat, KVFormat]
"""Variants that differ in the linear block alone: in front of it their states are the same."""


class ModeSums:
    """One mode's sums by block of text [blocks]: nats, agreements, blocks passed, tokens, multiply-accumulates."""

    FIELDS = ("nll", "kl", "agreed", "depth", "left", "wrong", "done")

    def __init__(self, blocks: int, exits: int) -> None:
        self.table: Floats = np.zeros((len(self.FIELDS), blocks))
        self.by_exit: NDArray[np.int64] = np.zeros(exits, np.int64)

    def __getitem__(self, field: str) -> Floats:
        row: Floats = self.table[self.FIELDS.index(field)]
        return row

    def add(self, outcome: Outcome, batch: ScoredBatch, depths: NDArray[np.int64], done: Floats) -> None:
        """Add the batch's scored tokens. `depths` are those of the exits and of the end, `done` [T] is computed."""
        scored, passage = batch.scored.cpu().numpy(), outcome.passage
        left = passage.left < len(self.by_exit)
        values = (outcome.nll, outcome.kl, outcome.agreed, depths[passage.left], left, outcome.wrong, done)
        for field, value in enumerate(values):
            self.table[field] += np.bincount(
                batch.where[scored], weights=value[scored].astype(np.float64), minlength=self.table.shape[1]
            )
        self.by_exit += np.bincount(passage.left[scored & left], minlength=len(self.by_exit))


@dataclass(frozen=True, slots=True)
class _Counted:
    """By block of text [blocks]: tokens that count, those of them that might leave, those with a target, and full
    depth's multiply-accumulates."""

    tokens: Floats
    may_leave: Floats
    targets: Floats
    full: Floats


def evaluate_modes(
    modes: Sequence[Mode],
    models: Mapping[Variant, ForcedModel],
    rows: Sequence[Tensor] | ScoredText,
    *,
    text: str,
    batch_tokens: int,
    seed: int,
    sweep: Sequence[Mode] = (),
    journal: Journal | None = None,
    advance: Advance = lambda _tokens: None,
) -> EvaluationTable:
    """The figures of `modes` on `rows`; the first mode, with exits off, is the reference.

    `sweep` are more modes, kept apart in the table. `journal` remembers finished variants; it belongs to one model and
    text. `advance` is told the tokens that each mode reads, those of the sweep among them.
    """
    scored = rows if isinstance(rows, ScoredText) else ScoredText.of_rows(rows)
    asked = tuple(dict.fromkeys((*modes, *sweep)))
    run = _Run(asked, models, modes[0].variant, scored.blocks, journal or NoJournal(), advance)
    spec = run.reference_model.decoder.spec
    limit = batch_tokens if run.wide else min(batch_tokens, max(256, _DISTRIBUTIONS // spec.vocab_size))
    every = tuple(scored.batches(limit, run.reference_model.decoder.device))
    for number, part in enumerate(_parts(every, _STATES // spec.hidden_size)):
        run.evaluate(number, part)
    counted = _counted(every, scored.blocks, ComputeCost(spec))
    drawn = resamples(scored.blocks, seed)
    results = {mode: _result(mode, run.sums, modes[0], counted, spec.blocks, drawn) for mode in asked}
    return EvaluationTable(
        text,
        scored.tokens,
        scored.blocks,
        spec.blocks,
        tuple(results[mode] for mode in modes),
        tuple(results[mode] for mode in sweep),
    )


class _Run:
    """An evaluation under way: every mode's sums so far."""

    def __init__(
        self,
        asked: Sequence[Mode],
        models: Mapping[Variant, ForcedModel],
        reference: Variant,
        blocks: int,
        journal: Journal,
        advance: Advance,
    ) -> None:
        self._models, self._reference, self._blocks = models, reference, blocks
        self._journal, self._advance = journal, advance
        self.reference_model = models[reference]
        self.wide = self.reference_model.decoder.streamed
        self._exits = len(self.reference_model.exits)
        off = [Mode(mode.variant) for mode in asked]  # what exits' own price is measured against
        self._asked = frozenset(asked)
        self._families = _families(dict.fromkeys((*asked, *off)), reference)
        self.sums = {mode: self._empty() for family in self._families.values() for mode in family}

    def evaluate(self, part: int, batches: Sequence[ScoredBatch]) -> None:
        """Add what all modes make of `batches`, the text's part of that number."""
        finals: list[Tensor] = []  # the reference's states behind the last block, by batch
        for family, modes in self._families.items():
            name = f"evaluation-{part}-{family[0]}-{family[1]}"
            added = self._finished(name, modes, batches, finals)
            if added is None:
                added = self._family(modes, batches, finals)
                self._remember(name, added, finals if modes[0].variant == self._reference else [])
            for mode, sums in added.items():
                self.sums[mode].table += sums.table
                self.sums[mode].by_exit += sums.by_exit

    def _family(
        self, modes: Sequence[Mode], batches: Sequence[ScoredBatch], finals: list[Tensor]
    ) -> dict[Mode, ModeSums]:
        """The sums of a family's modes. Where the reference is among them its last states are added to `finals`."""
        sums = {mode: self._empty() for mode in modes}
        by_variant: dict[Variant, list[Mode]] = {}
        for mode in modes:
            by_variant.setdefault(mode.variant, []).append(mode)
        least = min((mode.threshold for mode in modes if mode.threshold is not None), default=None)
        for place, batch in enumerate(batches):
            reference: Reference | None = None
            base: VariantPass | None = None
            for variant, own in by_variant.items():
                model = self._models[variant]
                states = model.states_by_depth(
                    batch.batch, self._fork(by_variant), None if base is None else base.states
                )
                if variant == self._reference:
                    finals.append(states[model.blocks])
                if reference is None:
                    reference = self._distributions(finals[place], batch)
                passed = variant_pass(model, batch, states, reference, least, base)
                base = base or passed
                self._add(model, batch, own, passed, reference, sums)
        return sums

    def _add(
        self,
        model: ForcedModel,
        batch: ScoredBatch,
        modes: Sequence[Mode],
        passed: VariantPass,
        reference: Reference,
        sums: Mapping[Mode, ModeSums],
    ) -> None:
        decoder = model.decoder
        cost = ComputeCost(decoder.spec, model.exits, decoder.linear_block)
        depths = np.array([model.depth(number) for number in range(len(model.exits) + 1)])
        for mode in modes:
            outcome = mode_outcome(model, batch, mode, passed, reference)
            sums[mode].add(outcome, batch, depths, cost.done(outcome.passage, mode.skipped_kv))
            if mode in self._asked:
                self._advance(batch.batch.tokens)

    def _distributions(self, final: Tensor, batch: ScoredBatch) -> Reference:
        decoder = self.reference_model.decoder
        with torch.inference_mode():
            return reference_of(
                decoder.head, final, batch.scored, decoder.spec.vocab_size, keep=not self.wide
            )

    def _fork(self, variants: Collection[Variant]) -> int | None:
        """The block in front of which a family's variants part: the one that its linear block replaces."""
        for variant in variants:
            block = self._models[variant].decoder.linear_block
            if block is not None:
                return block.index
        return None

    def _empty(self) -> ModeSums:
        return ModeSums(self._blocks, self._exits)

    def _remember(self, name: str, sums: Mapping[Mode, ModeSums], finals: Sequence[Tensor]) -> None:
        tensors = {
            "sums": torch.from_numpy(np.stack([each.table for each in sums.values()])),
            "by_exit": torch.from_numpy(np.stack([each.by_exit for each in sums.values()])),
        }
        if finals:
            tensors["final"] = torch.cat(list(finals)).cpu()
        self._journal.write(name, tensors, [str(mode) for mode in sums])

    def _finished(
        self, name: str, modes: Sequence[Mode], batches: Sequence[ScoredBatch], finals: list[Tensor]
    ) -> dict[Mode, ModeSums] | None:
        """What the journal knows of a family, if it knows just these modes."""
        found = self._journal.read(name)
        if found is None or found[1] != [str(mode) for mode in modes]:
            return None
        tensors = found[0]
        if "final" in tensors:
            held = tensors["final"].to(self.reference_model.decoder.device)
            finals += torch.split(held, [batch.batch.tokens for batch in batches])
        sums = {mode: self._empty() for mode in modes}
        for place, mode in enumerate(modes):
            sums[mode].table += tensors["sums"][place].numpy()
            sums[mode].by_exit += tensors["by_exit"][place].numpy()
            if mode in self._asked:
                self._advance(sum(batch.batch.tokens for batch in batches))
        return sums


def _families(modes: Iterable[Mode], reference: Variant) -> dict[Family, list[Mode]]:
    """The modes by family, the reference's first, and in it the variant that the others go on from."""
    order = sorted(
        modes,
        key=lambda mode: (
            (mode.variant.weights, mode.variant.kv_cache) != (reference.weights, reference.kv_cache),
            mode.variant != reference,
            mode.variant.weights,
            mode.variant.kv_cache,
            mode.variant.linear_block,
        ),
    )
    families: dict[Family, list[Mode]] = {}
    for mode in order:
        families.setdefault((mode.variant.weights, mode.variant.kv_cache), []).append(mode)
    return families


def _parts(batches: Sequence[ScoredBatch], tokens: int) -> Iterator[tuple[ScoredBatch, ...]]:
    """`batches` in runs of at most `tokens` tokens, at least one batch each."""
    run: list[ScoredBatch] = []
    held = 0
    for batch in batches:
        if run and held + batch.batch.tokens > tokens:
            yield tuple(run)
            run, held = [], 0
        run.append(batch)
        held += batch.batch.tokens
    yield tuple(run)


def _counted(batches: Sequence[ScoredBatch], blocks: int, cost: ComputeCost) -> _Counted:
    tokens, may_leave, targets, full = (np.zeros(blocks) for _ in range(4))
    for batch in batches:
        scored = batch.scored.cpu().numpy()
        positions, follows = batch.batch.positions.cpu().numpy(), batch.batch.targets.cpu().numpy() >= 0
        for sums, value in (
            (tokens, scored),
            (may_leave, positions > 0),
            (targets, follows),
            (full, cost.full_depth(positions)),
        ):
            sums += np.bincount(batch.where, weights=np.where(scored, value, 0.0), minlength=blocks)
    return _Counted(tokens, may_leave, targets, full)


def _result(
    mode: Mode,
    sums: Mapping[Mode, ModeSums],
    reference: Mode,
    counted: _Counted,
    blocks: int,
    drawn: NDArray[np.int64],
) -> ModeResult:
    own, tokens, targets = sums[mode], counted.tokens, counted.targets
    base, off = sums[reference]["nll"], sums[Mode(mode.variant)]["nll"]
    exits = mode.threshold is not None
    return ModeResult(
        mode=mode,
        perplexity=block_ratio(own["nll"], targets, drawn, np.exp),
        perplexity_increase=block_difference(own["nll"], base, targets, drawn, np.exp),
        perplexity_ratio=block_ratio(own["nll"] - base, targets, drawn, np.exp),
        exits_ratio=block_ratio(own["nll"] - off, targets, drawn, np.exp) if exits else None,
        kl=block_ratio(own["kl"], tokens, drawn),
        agreement=(block_ratio if mode == reference else block_share)(own["agreed"], tokens, drawn),
        mean_depth=block_ratio(own["depth"], tokens, drawn),
        exit_rate=(block_share if exits else block_ratio)(own["left"], counted.may_leave, drawn),
        disagreement=block_share(own["wrong"], own["left"], drawn) if own["left"].sum() > 0 else None,
        passes_saved=block_ratio(own["depth"], blocks * tokens, drawn, _saved),
        compute_saved=block_ratio(own["done"], counted.full, drawn, _saved),
        by_exit=tuple(int(count) for count in own.by_exit),
        tokens=int(tokens.sum()),
    )


def _saved(shares: Floats) -> Floats:
    return 1.0 - shares
