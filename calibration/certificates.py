"""Certificates of every combination, as the manifest holds them and as the report explains them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from exeunt.calibration.model_stack import ModelStack
from exeunt.calibration.risk import Certificate
from exeunt.calibration.thresholds import Certification, ThresholdPlan, certify
from exeunt.compression.exits import ExitHead
from exeunt.compression.manifest import RiskEntry, RiskTarget
from exeunt.compression.variant import Variant


@dataclass(frozen=True, slots=True)
class CertifiedVariant:
    """One combination's outcome; skipped keys and values are propagated."""

    variant: Variant
    certification: Certification

    def entry(self, confidence: float) -> RiskEntry:
        """The line of the risk table."""
        return RiskEntry(
            weights=self.variant.weights,
            kv_cache=self.variant.kv_cache,
            linear_block=self.variant.linear_block,
            skipped_kv="propagate",
            targets=tuple(_target(certificate) for certificate in self.certification.certificates),
            confidence=confidence,
        )


def certify_variants(
    stack: ModelStack,
    exits: Sequence[ExitHead],
    rows: Sequence[Tensor],
    plan: ThresholdPlan,
    *,
    batch_tokens: int,
    confidence: float,
    advance: Callable[[int], None],
) -> tuple[CertifiedVariant, ...]:
    """Certify every variant of `stack` on the held-out `rows`, all with the same plan.

    The deployed variant has all rows, the others every second one: there are seven of them.
    """
    outcomes = []
    for variant in stack.variants:
        model = stack.forced(variant, exits)
        own = rows_for(variant, stack, rows)
        certification = certify(
            model, own, plan, batch_tokens=batch_tokens, confidence=confidence, advance=advance
        )
        outcomes.append(CertifiedVariant(variant, certification))
    return tuple(outcomes)


def rows_for(variant: Variant, stack: ModelStack, rows: Sequence[Tensor]) -> Sequence[Tensor]:
    """The rows that `variant` is certified on."""
    return rows if variant == stack.deployed else rows[::2]


def _target(certificate: Certificate) -> RiskTarget:
    seen = certificate.tokens > 0
    return RiskTarget(
        target=certificate.target,
        certified=certificate.certified,
        threshold=certificate.threshold,
        exit_rate=certificate.exits / certificate.tokens if seen else None,
        disagreement=certificate.disagreement,
        upper_bound=certificate.upper_bound,
        tokens=certificate.exits,
        reason=certificate.reason,
    )
