"""Histograms that the engine's thread observes at every step and token, where prometheus-client's own cost too much.

Its `Histogram.observe` takes locks and goes through the buckets. What is exported is the same, by the library's
interface for collectors of one's own.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import INF, floatToGoString


class Observations:
    """The buckets of one set of label values. One thread observes, any may read."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` ascend; what lies above all of them is counted too."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        """Count a value in the first bucket whose bound it does not exceed."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def read(self) -> tuple[list[int], float]:
        """How many values did not exceed each bound, then all of them; and the sum of all."""
        return list(accumulate(self._counts)), self._total


class StepHistogram(Collector):
    """A histogram of the family `name`, its children known from the start."""

    def __init__(
        self,
        name: str,
        text: str,
        labels: Sequence[str],
        children: Iterable[Sequence[str]],
        bounds: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        """`children` are the values of `labels` of each. Raises ValueError where the registry has the name already."""
        self._name, self._text, self._labels = name, text, tuple(labels)
        self._les = [floatToGoString(bound) for bound in (*bounds, INF)]  # type: ignore[no-untyped-call]
        self._children = {tuple(values): Observations(bounds) for values in children}
        registry.register(self)

    def child(self, *values: str) -> Observations:
        """The observations of these label values. Raises KeyError for others than the `children`."""
        return self._children[values]

    def describe(self) -> Iterator[HistogramMetricFamily]:
        """The family without its children: what the registry tells names by."""
        yield self._family()

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The family as it stands."""
        family = self._family()
        for values, child in self._children.items():
            counts, total = child.read()
            family.add_metric(values, list(zip(self._les, counts, strict=True)), total)
        yield family

    def _family(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(self._name, self._text, labels=self._labels)
