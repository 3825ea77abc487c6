"""Certificates of every combination, as the manifest holds them and as the report explains them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from exeunt.calibration.certification import (
    Certification,
    certify_backfilled,
    certify_propagated,
    full_depth_pass,
)
from exeunt.calibration.model_stack import ModelStack
from exeunt.calibration.risk import Certificate
from exeunt.calibration.thresholds import ThresholdPlan
from exeunt.compression.exits import ExitHead
from exeunt.compression.manifest import RiskEntry, RiskTarget
from exeunt.compression.variant import SkippedKV, Variant


@dataclass(frozen=True, slots=True)
class CertifiedVariant:
    """The outcome for one combination: a variant, and what becomes of skipped keys and values."""

    variant: Variant
    skipped_kv: SkippedKV
    certification: Certification

    def entry(self, confidence: float) -> RiskEntry:
        """The line of the risk table."""
        return RiskEntry(
            weights=self.variant.weights,
            kv_cache=self.variant.kv_cache,
            linear_block=self.variant.linear_block,
            skipped_kv=self.skipped_kv,
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
    """Certify every variant of `stack` on the held-out `rows`, backfilled and propagated, all with the same plan.

    The deployed variant has all rows, the others every second one: there are seven of them.
    """
    outcomes: list[CertifiedVariant] = []
    for variant in stack.variants:
        model = stack.forced(variant, exits)
        own = rows_for(variant, stack, rows)
        full_depth = full_depth_pass(
            model, own, min(plan.thresholds), batch_tokens=batch_tokens, advance=advance
        )
        backfilled = certify_backfilled(full_depth, plan, confidence=confidence)
        propagated = backfilled  # what is skipped lies behind a single exit: it decides nothing there
        if len(exits) > 1:
            propagated = certify_propagated(model, full_depth, plan, confidence=confidence, advance=advance)
        outcomes.append(CertifiedVariant(variant, "backfill", backfilled))
        outcomes.append(CertifiedVariant(variant, "propagate", propagated))
    return tuple(outcomes)


def certify_passes(exits: Sequence[ExitHead], plan: ThresholdPlan) -> int:
    """The most passes over a variant's rows that certifying it takes."""
    return 1 + (len(plan.thresholds) if len(exits) > 1 else 0)


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
