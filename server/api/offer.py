"""What the loaded model offers to requests: variants, exits and certified thresholds, as plain data."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from exeunt.compression.manifest import NllRiskEntry, RiskEntry
from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import SkippedKV, Variant
from exeunt.server.request import ExitMode

Risk = Literal["max_disagreement", "max_nll_increase"]
"""What a target bounds, as the field of a request that asks for it."""
SKIPPED_KV: Final[tuple[SkippedKV, ...]] = ("backfill", "propagate")  # the first is taken where both would do


@dataclass(frozen=True, slots=True)
class Certificate:
    """One line of a risk table: the threshold certified for a target, None where it is not, for the `reason` given."""

    target: float
    threshold: float | None
    reason: str | None = None


Table = Mapping[tuple[Variant, SkippedKV], tuple[Certificate, ...]]


@dataclass(frozen=True, slots=True)
class Offer:
    """What a request may ask of the loaded model.

    `default` is the variant of a request that asks for nothing: INT4 weights and KV where a bundle holds them.
    `modes` are the early-exit modes: `verified` needs exits, `approximate` such at which tokens may leave for good.
    `certificates` are of disagreement, `nll_certificates` of the NLL increase.
    """

    variants: tuple[Variant, ...]
    default: Variant
    exits: tuple[str, ...] = ()
    modes: tuple[ExitMode, ...] = ("off",)
    certificates: Table = field(default_factory=dict)
    nll_certificates: Table = field(default_factory=dict)

    def certified(
        self, variant: Variant, skipped_kv: SkippedKV, risk: Risk = "max_disagreement"
    ) -> dict[float, float]:
        """The certified targets of a combination, ascending, with their thresholds."""
        lines = self._table(risk).get((variant, skipped_kv), ())
        found = {line.target: line.threshold for line in lines if line.threshold is not None}
        return dict(sorted(found.items()))

    def why_not(self, variant: Variant, skipped_kv: SkippedKV, risk: Risk, target: float) -> str | None:
        """Why a target is not certified for a combination, as its bundle says; None where it says nothing of it."""
        lines = self._table(risk).get((variant, skipped_kv), ())
        return next((line.reason for line in lines if line.target == target), None)

    @property
    def default_mode(self) -> ExitMode:
        """The early-exit mode of a request that asks for nothing: the one that changes no answer."""
        return "verified" if "verified" in self.modes else "off"

    def default_skipped_kv(
        self, variant: Variant, target: float | None = None, risk: Risk = "max_disagreement"
    ) -> SkippedKV:
        """How keys and values of skipped blocks come to be where a request leaves it open.

        By backfill where `target`, or with None any target, is certified for it: it is exact. Else as is certified,
        and by backfill where that is not either.
        """
        for method in SKIPPED_KV:
            certified = self.certified(variant, method, risk)
            if target in certified or (target is None and certified):
                return method
        return next((method for method in SKIPPED_KV if self.certified(variant, method, risk)), SKIPPED_KV[0])

    def _table(self, risk: Risk) -> Table:
        return self.certificates if risk == "max_disagreement" else self.nll_certificates


def offer_of(model: LoadedModel) -> Offer:
    """What a loaded model offers."""
    manifest = model.manifest
    return Offer(
        variants=tuple(sorted(model.variants)),
        default=model.default_variant,
        exits=tuple(head.name for head in model.exits),
        modes=exit_modes(exits=len(model.exits), certified=len(model.certified_exits)),
        certificates=_certificates(() if manifest is None else manifest.risk_table),
        nll_certificates=_certificates(() if manifest is None else manifest.nll_risk_table),
    )


def _certificates(table: Iterable[RiskEntry] | Iterable[NllRiskEntry]) -> Table:
    return {
        (entry.variant, entry.skipped_kv): tuple(
            Certificate(line.target, line.threshold if line.certified else None, line.reason)
            for line in entry.targets
        )
        for entry in table
    }


def exit_modes(*, exits: int, certified: int) -> tuple[ExitMode, ...]:
    """The modes of a model with so many exits, at so many of which tokens may leave for good."""
    if not exits:
        return ("off",)
    return ("off", "verified", "approximate") if certified else ("off", "verified")
