"""What the loaded model offers to requests: variants, exits and certified thresholds, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.server.request import SkippedKV


@dataclass(frozen=True, slots=True)
class Certificate:
    """One line of a risk table: the threshold certified for a target, None where the target is not certified."""

    target: float
    threshold: float | None


@dataclass(frozen=True, slots=True)
class Offer:
    """What a request may ask of the loaded model.

    `default` is the variant of a request that asks for nothing: INT4 weights and KV where a bundle holds them.
    """

    variants: tuple[Variant, ...]
    default: Variant
    exits: tuple[str, ...] = ()
    certificates: Mapping[tuple[Variant, SkippedKV], tuple[Certificate, ...]] = field(default_factory=dict)

    def certified(self, variant: Variant, skipped_kv: SkippedKV) -> dict[float, float]:
        """The certified targets of a combination, ascending, with their thresholds."""
        lines = self.certificates.get((variant, skipped_kv), ())
        found = {line.target: line.threshold for line in lines if line.threshold is not None}
        return dict(sorted(found.items()))


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
        certificates=certificates,
    )
