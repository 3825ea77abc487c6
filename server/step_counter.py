"""Counters that the engine's thread adds to at every step and token, read when they are asked for.

prometheus-client's own take a lock for every addition; gathering additions to make them now and then would leave a
scrape behind by as long as a step takes.
"""

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector


class Count:
    """What was counted under one set of label values. One thread adds, any may read."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float) -> None:
        """Count so much more. Raises ValueError where it is less, for then nothing that sums it up is right."""
        if not amount >= 0:
            raise ValueError(f"{amount} was to be counted, a counter only grows")
        self.value += amount


class StepCounter(Collector):
    """A counter of the family `name`, its children known from the start."""

    def __init__(
        self,
        name: str,
        text: str,
        labels: Sequence[str],
        children: Iterable[Sequence[str]],
        registry: CollectorRegistry,
    ) -> None:
        """`children` are the values of `labels` of each. Raises ValueError where the registry has the name already."""
        self._name, self._text, self._labels = name, text, tuple(labels)
        self._children = {tuple(values): Count() for values in children}
        registry.register(self)

    def child(self, *values: str) -> Count:
        """The count of these label values. Raises KeyError for others than the `children`."""
        return self._children[values]

    def describe(self) -> Iterator[CounterMetricFamily]:
        """The family without its children: what the registry tells names by."""
        yield CounterMetricFamily(self._name, self._text, labels=self._labels)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The family as it stands."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for values, child in self._children.items():
            family.add_metric(values, child.value)
        yield family
