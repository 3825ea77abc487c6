"""Every mode of a model on a held-out text, teacher-forced: perplexity, KL, agreement and depth with intervals.

The reference is the full-precision full-depth model, or the least compressed variant that there is. Intervals are
bootstraps over blocks of text (`exeunt.calibration.bootstrap`), all modes on the same resamples.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exeunt.calibration.bootstrap import Floats, block_difference, block_ratio, resamples
from exeunt.calibration.bootstrap import Measure as Measure  # where others look for it
from exeunt.calibration.risk import percent
from exeunt.calibration.sequence_batch import SequenceBatch, batches
from exeunt.calibration.teacher_forcing import LOGITS_AT_ONCE, ForcedModel
from exeunt.calibration.thresholds import text_blocks
from exeunt.compression.manifest import EvaluationRow
from exeunt.compression.variant import SkippedKV, Variant

WORTHWHILE: Final = 0.10
"""An exit rate below this everywhere asks for one looser, uncertified row, so that the trade can be seen."""

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Mode:
    """One row of the evaluation: a variant, and the threshold of its exits (None: off) with what is behind it."""

    variant: Variant
    threshold: float | None = None
    target: float | None = None  # the certified target that the threshold was looked up for
    skipped_kv: SkippedKV = "propagate"  # of no meaning with exits off

    @property
    def name(self) -> str:
        """A short name: the variant's, then the exits."""
        parts = [self.variant.short_name]
        if self.target is not None:
            parts.append(f"exits {percent(self.target)} certified")
        elif self.threshold is not None:
            parts.append(f"exits at {self.threshold:.2f}, uncertified")
        if self.threshold is not None and self.skipped_kv == "backfill":
            parts[-1] += ", backfill"
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class ModeResult:
    """One mode's figures. KL is in nats per token against the reference; depth in blocks per token.

    `agreement` is of top tokens with the reference, `disagreement` of the tokens that left early with full depth of the
    same variant (None when none left). `perplexity_increase` is over the reference.
    """

    mode: Mode
    perplexity: Measure
    perplexity_increase: Measure
    kl: Measure
    agreement: Measure
    mean_depth: Measure
    exit_rate: Measure
    disagreement: Measure | None
    by_exit: tuple[int, ...]
    tokens: int

    def record(self) -> EvaluationRow:
        """The row as a manifest holds it."""
        return EvaluationRow(
            name=self.mode.name,
            weights=self.mode.variant.weights,
            kv_cache=self.mode.variant.kv_cache,
            linear_block=self.mode.variant.linear_block,
            early_exit="off" if self.mode.threshold is None else "approximate",
            skipped_kv=None if self.mode.threshold is None else self.mode.skipped_kv,
            target=self.mode.target,
            threshold=self.mode.threshold,
            perplexity=self.perplexity.value,
            kl=max(0.0, self.kl.value),
            agreement=self.agreement.value,
            mean_depth=self.mean_depth.value,
            exit_rate=self.exit_rate.value,
            tokens=self.tokens,
        )


@dataclass(frozen=True, slots=True)
class EvaluationTable:
    """Every mode's figures on one text, the reference first. `blocks` is the depth of the full model."""

    text: str
    tokens: int
    text_blocks: int
    blocks: int
    results: tuple[ModeResult, ...]

    HEADERS = (
        "mode",
        "perplexity",
        "change",
        "KL",
        "agreement",
        "mean depth",
        "exit rate",
        "exits that differ",
    )

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text, one tuple per mode in the order of `HEADERS`, intervals in brackets."""
        return list(zip(self.names, *(column.cells for column in self.columns()), strict=True))

    @property
    def names(self) -> tuple[str, ...]:
        """The modes' names."""
        return tuple(result.mode.name for result in self.results)

    def columns(self) -> tuple["TextColumn", ...]:
        """The figures as text, by column."""
        results = self.results
        depths = tuple(f"{result.mean_depth.value:.2f} of {self.blocks}" for result in results)
        columns = (
            ([result.perplexity for result in results], "{:.2f}", False),
            ([result.perplexity_increase for result in results], "{:+.2f}", True),
            ([result.kl for result in results], "{:.4f}", True),
            ([result.agreement for result in results], "{:.1%}", True),
            None,
            ([result.exit_rate for result in results], "{:.1%}", True),
            ([result.disagreement for result in results], "{:.1%}", True),
        )
        return tuple(
            TextColumn(header, depths, depths) if each is None else _text_column(header, *each)
            for header, each in zip(self.HEADERS[1:], columns, strict=True)
        )


@dataclass(frozen=True, slots=True)
class TextColumn:
    """A column of an evaluation as text, a cell for each mode; `values` are the `cells` without their intervals."""

    header: str
    cells: tuple[str, ...]
    values: tuple[str, ...]


def _text_column(
    header: str, measures: Sequence[Measure | None], form: str, with_interval: bool
) -> TextColumn:
    values = tuple("" if measure is None else form.format(measure.value) for measure in measures)
    cells = tuple("" if measure is None else _shown(measure, form) for measure in measures)
    return TextColumn(header, cells if with_interval else values, values)


def _shown(measure: Measure, form: str) -> str:
    return f"{form.format(measure.value)} [{form.format(measure.low)}, {form.format(measure.high)}]"


@dataclass(slots=True)
class _Sums:
    """One mode's sums by block of text."""

    blocks: int
    exits: int
    nll: Floats = field(init=False)
    kl: Floats = field(init=False)
    agreed: Floats = field(init=False)
    depth: Floats = field(init=False)
    left: Floats = field(init=False)
    wrong: Floats = field(init=False)
    by_exit: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.nll, self.kl, self.agreed, self.depth, self.left, self.wrong = (
            np.zeros(self.blocks) for _ in range(6)
        )
        self.by_exit = [0] * self.exits


@dataclass(frozen=True, slots=True)
class _Reference:
    """The reference's log-probabilities [T, V] of one batch, and its top tokens [T]."""

    log_probs: Tensor
    top: Tensor


def evaluate_modes(
    modes: Sequence[Mode],
    models: Mapping[Variant, ForcedModel],
    rows: Sequence[Tensor],
    *,
    text: str,
    batch_tokens: int,
    seed: int,
    advance: Advance = lambda _tokens: None,
) -> EvaluationTable:
    """The figures of `modes` on `rows`; the first mode, with exits off, is the reference.

    `advance` is told the tokens of each mode's pass.
    """
    reference, any_model = modes[0], models[modes[0].variant]
    vocab = any_model.decoder.spec.vocab_size
    where = text_blocks(rows)
    blocks = int(where[-1]) + 1
    sums = [_Sums(blocks, len(any_model.exits)) for _ in modes]
    scored, tokens = np.zeros(blocks), np.bincount(where, minlength=blocks).astype(np.float64)
    by_variant = {
        mode.variant: [i for i, m in enumerate(modes) if m.variant == mode.variant] for mode in modes
    }
    start = 0
    for batch in batches(
        rows, min(batch_tokens, max(256, LOGITS_AT_ONCE // vocab)), any_model.decoder.device
    ):
        own = torch.from_numpy(where[start : start + batch.tokens])
        _add(scored, own, (batch.targets >= 0).double().cpu())
        states = models[reference.variant].full_depth_at_exits(batch)
        held = _reference(models[reference.variant], states[1])
        for variant, numbers in by_variant.items():
            own_states = (
                states if variant == reference.variant else models[variant].full_depth_at_exits(batch)
            )
            _run_variant(models[variant], own_states, modes, numbers, batch, own, held, sums)
            advance(batch.tokens * len(numbers))
        start += batch.tokens
    drawn = resamples(blocks, seed)
    results = [
        _result(mode, own, sums[0], scored, tokens, drawn) for mode, own in zip(modes, sums, strict=True)
    ]
    return EvaluationTable(text, int(tokens.sum()), blocks, any_model.blocks, tuple(results))


def _add(sums: Floats, at: Tensor, values: Tensor) -> None:
    sums += np.bincount(at.numpy(), weights=values.double().cpu().numpy(), minlength=len(sums))


@torch.inference_mode()
def _reference(model: ForcedModel, final: Tensor) -> _Reference:
    log_probs = model.decoder.head(final).log_softmax(-1)
    return _Reference(log_probs, log_probs.argmax(-1))


@torch.inference_mode()
def _run_variant(
    model: ForcedModel,
    states: tuple[tuple[Tensor, ...], Tensor],
    modes: Sequence[Mode],
    numbers: Sequence[int],
    batch: SequenceBatch,
    where: Tensor,
    reference: _Reference,
    sums: Sequence[_Sums],
) -> None:
    """Add what every mode of one variant makes of a batch to its sums; they share the `states` at full depth."""
    at_exits, final = states
    own_top = torch.empty_like(batch.token_ids)
    counters = {n: _counter(model, batch, where, reference, own_top, sums[n]) for n in numbers}
    off = [counters[number] for number in numbers if modes[number].threshold is None]

    def at_full_depth(number: int, tokens: Tensor, logits: Tensor) -> None:
        own_top[tokens] = logits.argmax(-1)
        for count in off:
            count(number, tokens, logits)

    model.final(final, torch.arange(batch.tokens, device=final.device), at_full_depth)
    for number in numbers:
        threshold = modes[number].threshold
        if threshold is None:
            continue
        if modes[number].skipped_kv == "backfill":
            model.with_backfill(batch, threshold, at_exits, final, counters[number])
        else:
            model.with_exits(batch, threshold, at_exits[0], counters[number])


def _counter(
    model: ForcedModel,
    batch: SequenceBatch,
    where: Tensor,
    reference: _Reference,
    own_top: Tensor,
    sums: _Sums,
) -> Callable[[int, Tensor, Tensor], None]:
    """A sink that adds the tokens it is given to `sums`."""

    def count(number: int, tokens: Tensor, logits: Tensor) -> None:
        at = where[tokens.cpu()]
        log_probs = logits.log_softmax(-1)
        top, targets = logits.argmax(-1), batch.targets[tokens]
        nll = -log_probs.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
        wanted = reference.log_probs[tokens]
        _add(sums.nll, at, torch.where(targets >= 0, nll, torch.zeros_like(nll)))
        _add(sums.kl, at, (wanted.exp() * (wanted - log_probs)).sum(-1))
        _add(sums.agreed, at, (top == reference.top[tokens]).double())
        _add(sums.depth, at, torch.full((len(at),), float(model.depth(number))))
        if number < len(model.exits):
            _add(sums.left, at, torch.ones(len(at)))
            _add(sums.wrong, at, (top != own_top[tokens]).double())
            sums.by_exit[number] += len(at)

    return count


def _result(
    mode: Mode, sums: _Sums, reference: _Sums, scored: Floats, tokens: Floats, drawn: NDArray[np.int64]
) -> ModeResult:
    perplexity = block_ratio(sums.nll, scored, drawn, np.exp)
    return ModeResult(
        mode=mode,
        perplexity=perplexity,
        perplexity_increase=block_difference(sums.nll, reference.nll, scored, drawn, np.exp),
        kl=block_ratio(sums.kl, tokens, drawn),
        agreement=block_ratio(sums.agreed, tokens, drawn),
        mean_depth=block_ratio(sums.depth, tokens, drawn),
        exit_rate=block_ratio(sums.left, tokens, drawn),
        disagreement=block_ratio(sums.wrong, sums.left, drawn) if sums.left.sum() > 0 else None,
        by_exit=tuple(sums.by_exit),
        tokens=int(tokens.sum()),
    )
