"""What a load takes of an engine's pages of keys and values, as measured, and by the layout of the pages."""

from collections.abc import Callable

from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.deploy.load_driver import LoadDriver
from exeunt.server.drafting import Drafter
from exeunt.server.engine_config import EngineConfig
from exeunt.server.engine_metrics import EngineMetrics
from exeunt.server.request import GenerationRequest
from exeunt.server.tick_run import StageRun


class PagedLoads(LoadDriver):
    """A driver that, while it is asked to, sees how many pages its engine holds at most."""

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        metrics: EngineMetrics,
        new_drafter: Callable[[GenerationRequest], Drafter] | None = None,
    ) -> None:
        self._watching, self._fewest = False, 0
        super().__init__(model, config, metrics, on_stages=self._note, new_drafter=new_drafter)

    def watch(self) -> None:
        """Count anew, from now on."""
        self._fewest = self._engine.snapshot().kv_pages_total
        self._watching = True

    def most_pages(self) -> int:
        """The most pages that were held behind any run of stages since; no more is looked at."""
        self._watching = False
        return self._engine.snapshot().kv_pages_total - self._fewest

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self._engine.snapshot().page_bytes

    def _note(self, run: StageRun) -> None:
        if self._watching:
            self._fewest = min(self._fewest, self._engine.snapshot().kv_pages_free)


def paged_bytes(model: LoadedModel, variant: Variant, page_bytes: int, tokens: int) -> int:
    """Bytes of the pages of a sequence of so many tokens, by the layout."""
    return -(-tokens // model.kv_layout(variant, page_bytes).page_tokens) * page_bytes
