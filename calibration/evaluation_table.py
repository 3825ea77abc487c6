"""What an evaluation finds: modes, each mode's figures with intervals, and the table of all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from exeunt.calibration.bootstrap import Measure
from exeunt.calibration.risk import percent
from exeunt.compression.manifest import EvaluationRow
from exeunt.compression.variant import SkippedKV, Variant


@dataclass(frozen=True, slots=True)
class Mode:
    """One row of the evaluation: a variant, and the threshold of its exits (None: off) with what is behind it.

    `target` and `nll_target` are the certified targets of the two risks that the threshold was looked up for, a share
    of the tokens that leave and nats per token; both where one threshold holds both.
    """

    variant: Variant
    threshold: float | None = None
    target: float | None = None
    skipped_kv: SkippedKV = "propagate"  # of no meaning with exits off
    nll_target: float | None = None

    @property
    def certified(self) -> bool:
        """Whether the threshold is that of a certified target."""
        return self.target is not None or self.nll_target is not None

    @property
    def name(self) -> str:
        """A short name: the variant's, then the exits; that keys and values are backfilled goes without saying."""
        parts = [self.variant.short_name]
        if self.threshold is not None:
            promises = [
                *([] if self.target is None else [percent(self.target)]),
                *([] if self.nll_target is None else [f"{self.nll_target:g} nats"]),
            ]
            promise = " and ".join(promises)
            exits = f"exits {promise} certified" if promise else f"exits at {self.threshold:.2f}, uncertified"
            parts.append(exits + (", propagate" if self.skipped_kv == "propagate" else ""))
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class ModeResult:
    """One mode's figures. KL is in nats per token against the reference; depth in blocks per token.

    `exit_rate` is of the tokens that might leave, all but each row's first. `agreement` is of top tokens with the
    reference, `disagreement` of the tokens that left early with full depth of the same variant (None when none left).
    `perplexity_increase` is over the reference, `perplexity_ratio` to it, and `exits_ratio` to the same variant with
    exits off (None with exits off): unclipped, on the same resamples.
    `passes_saved` is the share of the blocks' passes that no token had to wait for, 1 - depth / blocks: with propagate
    they are never made, with backfill later and together. `compute_saved` is the share of full depth's
    multiply-accumulates that are not done, net of gates, projections and propagated keys and values: with backfill it
    is what exits cost, below zero (see `exeunt.calibration.compute`).
    """

    mode: Mode
    perplexity: Measure
    perplexity_increase: Measure
    perplexity_ratio: Measure
    exits_ratio: Measure | None
    kl: Measure
    agreement: Measure
    mean_depth: Measure
    exit_rate: Measure
    disagreement: Measure | None
    passes_saved: Measure
    compute_saved: Measure
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
            nll_target=self.mode.nll_target,
            threshold=self.mode.threshold,
            perplexity=self.perplexity.value,
            kl=max(0.0, self.kl.value),
            agreement=self.agreement.value,
            mean_depth=self.mean_depth.value,
            exit_rate=self.exit_rate.value,
            passes_saved=min(1.0, max(0.0, self.passes_saved.value)),
            compute_saved=self.compute_saved.value,
            tokens=self.tokens,
        )


@dataclass(frozen=True, slots=True)
class EvaluationTable:
    """Every mode's figures on one text, the reference first. `blocks` is the depth of the full model.

    `tokens` are those that count; `sweep` are modes that no row of the table shows: thresholds along the trade-off
    between quality and compute, none of them certified.
    """

    text: str
    tokens: int
    text_blocks: int
    blocks: int
    results: tuple[ModeResult, ...]
    sweep: tuple[ModeResult, ...] = ()

    HEADERS = (
        "mode",
        "perplexity",
        "change",
        "KL",
        "agreement",
        "mean depth",
        "exit rate",
        "exits that differ",
        "compute saved",
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
            ([result.compute_saved for result in results], "{:.1%}", True),
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


def _text_column(header: str, measures: Sequence[Measure | None], form: str, bracketed: bool) -> TextColumn:
    values = tuple("" if measure is None else form.format(measure.value) for measure in measures)
    cells = tuple("" if measure is None else with_interval(measure, form) for measure in measures)
    return TextColumn(header, cells if bracketed else values, values)


def with_interval(measure: Measure, form: str) -> str:
    """A value and its interval in brackets, a dash in these where there is none."""
    low, high = (form.format(end) for end in (measure.low, measure.high))
    return f"{form.format(measure.value)} [{f'{low}, {high}' if measure.bounded else '–'}]"
