"""What the loaded model offers to requests: variants, exits and certified thresholds, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import SkippedKV, Variant
from exeunt.server.request import ExitMode

SKIPPED_KV: Final[tuple[SkippedKV, ...]] = ("backfill", "propagate")  # the first is taken where both would do


@dataclass(frozen=True, slots=True)
class Certificate:
    """One line of a risk table: the threshold certified for a target, None where the target is not certified."""

    target: float
    threshold: float | None


@dataclass(frozen=True, slots=True)
class Offer:
    """What a request may ask of the loaded model.

    `default` is the variant of a request that asks for nothing: INT4 weights and KV where a bundle holds them.
    `modes` are the early-exit modes: `verified` needs exits, `approximate` such at which tokens may leave for good.
    """

    variants: tuple[Variant, ...]
    default: Variant
    exits: tuple[str, ...] = ()
    modes: tuple[ExitMode, ...] = ("off",)
    certificates: Mapping[tuple[Variant, SkippedKV], tuple[Certificate, ...]] = field(default_factory=dict)

    def certified(self, variant: Variant, skipped_kv: SkippedKV) -> dict[float, float]:
        """The certified targets of a combination, ascending, with their thresholds."""
        lines = self.certificates.get((variant, skipped_kv), ())
        found = {line.target: line.threshold for line in lines if line.threshold is not None}
        return dict(sorted(found.items()))

    @property
    def default_mode(self) -> ExitMode:
        """The early-exit mode of a request that asks for nothing: the one that changes no answer."""
        return "verified" if "verified" in self.modes else "off"

    def default_skipped_kv(self, variant: Variant, target: float | None = None) -> SkippedKV:
        """How keys and values of skipped blocks come to be where a request leaves it open.

        By backfill where `target`, or with None any target, is certified for it: it is exact. Else as is certified,
        and by backfill where that is not either.
        """
        for method in SKIPPED_KV:
            certified = self.certified(variant, method)
            if target in certified or (target is None and certified):
                return method
        return next((method for method in SKIPPED_KV if self.certified(variant, method)), SKIPPED_KV[0])


def offer_of(model: LoadedModel) -> Offer:
    """What a loaded model offers."""
    manifest = model.manifest
    table = manifest.risk_table if manifest is not None else ()
    certificates = {
        (entry.variant, entry.skipped_kv): tuple(
            Certificate(line.target, line.threshold if line.certified else None) for line in entry.targets
        )
        for entry in table
    }
    return Offer(
        variants=tuple(sorted(model.variants)),
        default=model.default_variant,
        exits=tuple(head.name for head in model.exits),
        modes=exit_modes(exits=len(model.exits), certified=len(model.certified_exits)),
        certificates=certificates,
    )


def exit_modes(*, exits: int, certified: int) -> tuple[ExitMode, ...]:
    """The modes of a model with so many exits, at so many of which tokens may leave for good."""
    if not exits:
        return ("off",)
    return ("off", "verified", "approximate") if certified else ("off", "verified")
