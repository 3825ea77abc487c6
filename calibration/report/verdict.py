"""The verdict: what each saving costs, what is certified, and which modes to use, by rules that the page states.

A cost is the increase of perplexity over the reference, relative to it, with the 95 % interval of the evaluation. Up to
`SMALL` it is called small, up to `FAIR` fair, beyond that large; where the interval holds zero it is said that the text
is too short to tell it from none. Nothing else is weighed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from exeunt.calibration.certificates import CertifiedVariant
from exeunt.calibration.evaluation import EvaluationTable, Measure, ModeResult
from exeunt.calibration.nll_risk import NllCertificate
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.parts import Tone
from exeunt.calibration.risk import Certificate
from exeunt.compression.variant import Variant

SMALL: Final = 0.01
FAIR: Final = 0.05
"""Shares of the reference's perplexity up to which a saving's cost is called small, or fair."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one saving, or several together, cost: perplexity over the reference, also as a share of it."""

    variant: Variant
    increase: Measure
    relative: Measure

    @property
    def tone(self) -> Tone:
        """Good, fair or bad, by the upper end of the interval: what the text cannot rule out counts."""
        return "good" if self.relative.high <= SMALL else "fair" if self.relative.high <= FAIR else "bad"

    @property
    def shown(self) -> bool:
        """Whether the text is long enough to tell the cost from none."""
        return self.relative.low > 0.0


@dataclass(frozen=True, slots=True)
class Advice:
    """A mode to use: a variant, its cost, and the certified target of its exits (None: verified, without loss)."""

    use: str
    cost: Cost
    target: float | None = None

    @property
    def request(self) -> dict[str, object]:
        """The `compression` of a request that asks for it."""
        variant = self.cost.variant
        exits: dict[str, object] = {"mode": "verified"}
        if self.target is not None:
            exits = {"mode": "approximate", "max_disagreement": self.target, "skipped_kv": "propagate"}
        return {
            "weights": variant.weights,
            "kv_cache": variant.kv_cache,
            "linear_block": variant.linear_block,
            "early_exit": exits,
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the report concludes. `alone` are single savings, `together` all variants' costs with exits off."""

    reference: ModeResult
    alone: tuple[Cost, ...]
    together: tuple[Cost, ...]
    certified: tuple[Certificate, ...]  # of the deployed variant, skipped keys and values propagated
    likelihood: tuple[NllCertificate, ...]  # the same of the second risk
    deployed: Variant | None  # the variant that exits were fitted on; None where there are none
    advice: tuple[Advice, ...]


def verdict_of(content: ReportContent) -> Verdict:
    """The verdict on a calibration."""
    table = content.table
    together = tuple(_cost(result, table) for result in table.results[1:] if result.mode.threshold is None)
    alone = tuple(cost for cost in together if _savings(cost.variant) == 1)
    deployed = deployed_outcome(content.certified)
    certified = () if deployed is None else deployed.certification.certificates
    return Verdict(
        reference=table.results[0],
        alone=alone,
        together=together,
        certified=certified,
        likelihood=() if deployed is None or deployed.nll is None else deployed.nll.certificates,
        deployed=None if deployed is None else deployed.variant,
        advice=_advice(table, together),
    )


def deployed_outcome(certified: Sequence[CertifiedVariant]) -> CertifiedVariant | None:
    """The outcome of the most compressed variant without a linear block: the one that exits were fitted on."""
    propagated = [each for each in certified if each.skipped_kv == "propagate"]
    without = [each for each in propagated if not each.variant.linear_block] or propagated
    return max(without, key=lambda each: _savings(each.variant), default=None)


def result_of(table: EvaluationTable, variant: Variant, target: float | None = None) -> ModeResult | None:
    """A variant's row with exits off, or at a certified target with propagated keys and values."""
    for result in table.results:
        mode = result.mode
        exits_off = mode.threshold is None and target is None
        at_target = target is not None and mode.target == target and mode.skipped_kv == "propagate"
        if mode.variant == variant and (exits_off or at_target):
            return result
    return None


def relative_to(measure: Measure, base: float) -> Measure:
    """A measure as a share of `base`."""
    return Measure(measure.value / base, measure.low / base, measure.high / base)


def _cost(result: ModeResult, table: EvaluationTable) -> Cost:
    base = table.results[0].perplexity.value
    return Cost(
        result.mode.variant, result.perplexity_increase, relative_to(result.perplexity_increase, base)
    )


def _savings(variant: Variant) -> int:
    return (variant.weights == "int4") + (variant.kv_cache == "int4") + variant.linear_block


def _advice(table: EvaluationTable, costs: Sequence[Cost]) -> tuple[Advice, ...]:
    """The most compressed modes of small and of fair cost, and certified exits of fair cost that save compute."""
    uncompressed = _cost(table.results[0], table)
    small, fair = (
        max(
            (cost for cost in (uncompressed, *costs) if cost.relative.high <= limit),
            key=lambda cost: (_savings(cost.variant), -cost.relative.value),
        )
        for limit in (SMALL, FAIR)
    )
    advice = [Advice("Quality first", small)]
    if fair.variant != small.variant:
        advice.append(Advice("More saved at a fair cost", fair))
    exits = [
        (result, cost)
        for result in table.results
        if result.mode.target is not None
        and result.mode.skipped_kv == "propagate"
        and result.compute_saved.value > 0
        and (cost := _cost(result, table)).relative.high <= FAIR
    ]
    if exits:
        result, cost = max(exits, key=lambda pair: (_savings(pair[1].variant), pair[0].compute_saved.value))
        advice.append(Advice("Exits at a stated risk", cost, result.mode.target))
    return tuple(advice)
