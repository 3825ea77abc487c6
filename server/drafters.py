"""Makes the drafters of an engine and keeps what those of one variant share. Plain Python, no torch."""

from exeunt.compression.variant import Variant
from exeunt.server.drafting import AdaptiveDrafter, Drafter, ExitWorth
from exeunt.server.request import GenerationRequest
from exeunt.server.stage_costs import DraftCosts, StageCosts
from exeunt.server.stages import StagePlan

_COSTS_KEPT = 16  # ticks


class AdaptiveDrafters:
    """Drafters that draft where it pays by the costs of these stages, all of a variant by the same experience."""

    def __init__(self, plan: StagePlan, costs: StageCosts) -> None:
        self._plan, self._costs = plan, costs
        self._kept: dict[Variant, DraftCosts] = {}
        self._worth: dict[Variant, ExitWorth] = {}
        self._ticks = 0

    def new(self, request: GenerationRequest) -> Drafter:
        """A drafter for one answer of a request."""
        variant = request.variant
        worth = self._worth.setdefault(variant, ExitWorth())
        return AdaptiveDrafter(
            lambda: self.costs(variant), worth, lambda rows: self._costs.begun_ahead(variant, rows)
        )

    def costs(self, variant: Variant) -> DraftCosts:
        """The costs of drafting as they stood within the last few ticks: they change slowly and are asked often."""
        costs = self._kept.get(variant)
        if costs is None or not costs.seen:
            costs = self._costs.drafting(variant, self._plan.drafting or 0, self._plan.last)
            self._kept[variant] = costs
        return costs

    def ticked(self) -> None:
        """A tick of the engine has passed."""
        self._ticks += 1
        for worth in self._worth.values():
            worth.ticked()
        if self._ticks % _COSTS_KEPT == 0:
            self._kept.clear()
