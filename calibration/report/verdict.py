"""The verdict: what each saving costs, what is certified, and which modes to use, by rules that the page states.

A cost is the increase of perplexity over the reference, relative to it, and the KL from the reference, both with the
95 % interval of the evaluation. It is called small where both upper ends are up to `SMALL`, fair up to `FAIR`, and
large beyond. On little text perplexity alone may call anything cheap, a block that changes every fifth top token too:
it hears of each place only the token that followed, and what it loses on some it wins on others. A KL of k nats is what
the logarithm of perplexity rises by, in expectation, on text that the reference itself writes: so the shares are the
same. Where the interval of perplexity holds zero it is said that the text is too short to tell it from none, and where
it lies below zero that this is not to be counted on. Of exits, what is certified is told for backfilled keys and
values, which is what a server does unless asked otherwise, or for propagated ones where nothing is certified for
backfill.
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
from exeunt.calibration.trade_off import METHODS
from exeunt.compression.variant import SkippedKV, Variant

SMALL: Final = 0.01
FAIR: Final = 0.05
"""Up to which a saving's cost is called small, or fair: shares of the reference's perplexity, and nats of KL to it."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one saving, or several together, cost: perplexity over the reference, also as a share of it, and KL.

    `kl` is from the reference, in nats per token.
    """

    variant: Variant
    increase: Measure
    relative: Measure
    kl: Measure

    @property
    def tone(self) -> Tone:
        """Good, fair or bad, by the upper ends of the intervals: what the text cannot rule out counts.

        Without an interval nothing is ruled out, and nothing shown either: none of them.
        """
        if not self.relative.bounded:
            return ""
        return "good" if self.within(SMALL) else "fair" if self.within(FAIR) else "bad"

    def within(self, limit: float) -> bool:
        """Whether the text rules out more than `limit`, as a share of perplexity and as nats of KL."""
        return self.relative.high <= limit and self.kl.ends[1] <= limit

    @property
    def shown(self) -> bool:
        """Whether the text is long enough to tell the change of perplexity from none, a rise or a fall."""
        return self.relative.low > 0.0 or self.better

    @property
    def better(self) -> bool:
        """Whether the whole interval of perplexity lies below that of the reference."""
        return self.relative.high < 0.0


@dataclass(frozen=True, slots=True)
class Advice:
    """A mode to use, its cost, and what was measured of it where its exits are certified (None: verified, no loss)."""

    use: str
    cost: Cost
    exits: ModeResult | None = None

    @property
    def request(self) -> dict[str, object]:
        """The `compression` of a request that asks for it."""
        variant = self.cost.variant
        exits: dict[str, object] = {"mode": "verified"}
        if self.exits is not None:
            mode = self.exits.mode
            target: dict[str, object] = {"max_disagreement": mode.target}
            if mode.target is None:
                target = {"max_nll_increase": mode.nll_target}
            exits = {"mode": "approximate", **target, "skipped_kv": mode.skipped_kv}
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
    deployed: CertifiedVariant | None  # what is told of exits; None where none is to be certified
    advice: tuple[Advice, ...]


def verdict_of(content: ReportContent) -> Verdict:
    """The verdict on a calibration."""
    table = content.table
    together = tuple(_cost(result, table) for result in table.results[1:] if result.mode.threshold is None)
    alone = tuple(cost for cost in together if _savings(cost.variant) == 1)
    return Verdict(
        reference=table.results[0],
        alone=alone,
        together=together,
        deployed=deployed_outcome(content.certified),
        advice=_advice(table, together),
    )


def deployed_outcome(certified: Sequence[CertifiedVariant]) -> CertifiedVariant | None:
    """The outcome of the most compressed variant without a linear block: the one that exits were fitted on.

    Of its two ways with skipped keys and values it is backfill, unless something is certified for propagate alone.
    """
    without = [each for each in certified if not each.variant.linear_block] or certified
    most = max((_savings(each.variant) for each in without), default=0)
    own = {each.skipped_kv: each for each in without if _savings(each.variant) == most}
    ordered = [own[method] for method in METHODS if method in own]
    return next((each for each in ordered if _holds(each)), ordered[0] if ordered else None)


def _holds(outcome: CertifiedVariant) -> bool:
    """Whether any target of either risk is certified."""
    nll = () if outcome.nll is None else outcome.nll.certificates
    return any(each.certified for each in outcome.certification.certificates) or any(
        each.certified for each in nll
    )


def result_of(
    table: EvaluationTable,
    variant: Variant,
    certificate: Certificate | NllCertificate | None = None,
    skipped_kv: SkippedKV = "backfill",
) -> ModeResult | None:
    """A variant's row with exits off, or that of a certified target's threshold; None where there is no such row."""
    threshold = None if certificate is None else certificate.threshold
    if certificate is not None and threshold is None:
        return None
    for result in table.results:
        mode = result.mode
        if (mode.variant, mode.threshold) == (variant, threshold) and (
            threshold is None or mode.skipped_kv == skipped_kv
        ):
            return result
    return None


def net_saving(result: ModeResult) -> float:
    """What a mode's exits save in the end, a share of full depth; below zero they cost more than they save.

    With propagate it is compute. With backfill the compute comes later, and what is saved is passes that no token waits
    for, less what exits compute themselves.
    """
    saved = result.compute_saved.value
    return saved + result.passes_saved.value if result.mode.skipped_kv == "backfill" else saved


def relative_to(measure: Measure, base: float) -> Measure:
    """A measure as a share of `base`."""
    return Measure(measure.value / base, measure.low / base, measure.high / base)


def _cost(result: ModeResult, table: EvaluationTable) -> Cost:
    base = table.results[0].perplexity.value
    increase = result.perplexity_increase
    return Cost(result.mode.variant, increase, relative_to(increase, base), result.kl)


def _savings(variant: Variant) -> int:
    return (variant.weights == "int4") + (variant.kv_cache == "int4") + variant.linear_block


def _advice(table: EvaluationTable, costs: Sequence[Cost]) -> tuple[Advice, ...]:
    """The most compressed modes of small and of fair cost, and certified exits, by either risk, of fair cost.

    Where nothing is cheap enough it is the full model, which costs nothing by definition.
    """
    uncompressed = _cost(table.results[0], table)
    small, fair = (
        max(
            (uncompressed, *(cost for cost in costs if cost.within(limit))),
            key=lambda cost: (_savings(cost.variant), -cost.relative.value),
        )
        for limit in (SMALL, FAIR)
    )
    advice = [Advice("Quality first", small)]
    if fair.variant != small.variant:
        advice.append(Advice("More saved at a fair cost", fair))
    differ = [result for result in table.results if result.mode.target is not None]
    unlikelier = [result for result in table.results if result.mode.nll_target is not None]
    for use, results in (
        ("Exits, few of which differ", differ),
        ("Exits, text hardly less likely", unlikelier),
    ):
        found = _exits_advised(table, results)
        if found is not None and all(each.exits != found for each in advice):
            advice.append(Advice(use, _cost(found, table), found))
    return tuple(advice)


def _exits_advised(table: EvaluationTable, results: Sequence[ModeResult]) -> ModeResult | None:
    """The most compressed of `results` of fair cost whose exits save something, backfilled ones first."""
    worth = [
        result
        for result in results
        if net_saving(result) > 0 and _cost(result, table).within(FAIR) and _adds_little(result)
    ]
    for method in METHODS:
        own = [result for result in worth if result.mode.skipped_kv == method]
        if own:
            return max(own, key=lambda each: (_savings(each.mode.variant), net_saving(each)))
    return None


def _adds_little(result: ModeResult) -> bool:
    """Whether what exits add to the same savings is fair: by a certificate, or by the upper end of what was measured.

    The total alone does not say so: savings that are lucky on this text would pay for exits that are dear.
    """
    if result.mode.nll_target is not None and result.mode.nll_target <= FAIR:
        return True
    return result.exits_ratio is not None and result.exits_ratio.high - 1.0 <= FAIR
