"""What is true of a server at this moment, exported from time to time: requests, rows, pages, bytes held."""

import time
from typing import Final

from exeunt.compression.model import LoadedModel
from exeunt.server.engine_metrics import EngineMetrics
from exeunt.server.jobs import Jobs
from exeunt.server.pages import PagePool
from exeunt.server.scheduler import Scheduler

# Scrapes come every few seconds; setting gauges every tick would cost more than it shows.
_INTERVAL_S: Final = 0.05
_BYTES_INTERVAL_S: Final = 1.0  # adding up every tensor of a model takes longer than the rest


class Gauges:
    """Sets the gauges of one engine, on its thread."""

    def __init__(
        self, model: LoadedModel, metrics: EngineMetrics, jobs: Jobs, scheduler: Scheduler, pool: PagePool
    ) -> None:
        self._model, self._metrics, self._jobs = model, metrics, jobs
        self._scheduler, self._pool = scheduler, pool
        self._set_at = self._bytes_at = -_BYTES_INTERVAL_S

    def set(self, *, force: bool) -> None:
        """Export what is true now; without `force` only where that was done some time ago."""
        now = time.monotonic()
        if not force and now - self._set_at < _INTERVAL_S:
            return
        self._set_at = now
        used = {"int4": 0, "full": 0}
        for sequence in self._scheduler.running_sequences():
            used[sequence.variant.kv_cache] += len(sequence.table.pages)
        self._metrics.gauges(
            self._jobs.running,
            self._jobs.waiting,
            self._scheduler.rows_waiting(),
            {name: pages / self._pool.num_pages for name, pages in used.items()},
        )
        if force or now - self._bytes_at >= _BYTES_INTERVAL_S:
            self._bytes_at = now
            self._metrics.resident_bytes(self._model.resident_bytes())
