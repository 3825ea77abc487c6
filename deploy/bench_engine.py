"""`exeunt bench` on an engine in this process: no HTTP, the server's own ceiling."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.deploy.bench_load import Load, Trace
from exeunt.deploy.load_driver import LoadDriver, load_config, server_metrics
from exeunt.deploy.measured_model import MeasuredModel, measured_model
from exeunt.server.api.compression import resolve
from exeunt.server.api.offer import Offer, offer_of
from exeunt.server.api.schemas import CompressionOptions
from exeunt.server.engine_config import MAX_OWED, EngineConfig
from exeunt.server.stage_choice import SchedulingPolicy
from exeunt.server.stage_costs import DraftCosts
from exeunt.server.tick_run import StageRun


def engine_driver(
    model: LoadedModel,
    load: Load,
    scheduling: SchedulingPolicy = "run-through",
    on_stages: Callable[[StageRun], None] | None = None,
    max_owed: int = MAX_OWED,
) -> "EngineDriver":
    """An engine with room for the load; `on_stages` hears of every run of stages, what follows is EngineConfig's.

    Raises LoadError where the model has not that room.
    """
    return EngineDriver(model, load_config(model, load, scheduling, max_owed=max_owed), on_stages)


class EngineDriver:
    """Runs the load on an engine of its own, each mode as a request would ask for it; `close` ends it."""

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        on_stages: Callable[[StageRun], None] | None = None,
    ) -> None:
        self._model, self._offer = model, offer_of(model)
        self._driver = LoadDriver(model, config, server_metrics(model), on_stages)

    def close(self) -> None:
        """Stop the engine."""
        self._driver.close()

    def model(self) -> MeasuredModel:
        """Which model the engine runs. Raises BundleError where a plain checkpoint's files cannot be read."""
        return measured_model(self._model)

    def draft_costs(self, variant: Variant) -> DraftCosts:
        """What the engine takes drafting to cost, by what it has seen."""
        return self._driver.draft_costs(variant)

    def offer(self) -> Offer:
        """What the model offers."""
        return self._offer

    def prompts(self, count: int, tokens: int) -> list[list[int]]:
        """Passages of the packaged text."""
        return self._driver.prompts(count, tokens)

    def run(
        self, prompts: Sequence[Sequence[int]], compression: Mapping[str, Any], load: Load
    ) -> list[Trace]:
        """Answer every prompt, `load.concurrency` at a time. Raises BenchError where one fails."""
        applied = resolve(CompressionOptions.model_validate(compression), CompressionOptions(), self._offer)
        return self._driver.run(prompts, applied.variant, applied.exits, load)
