"""Histograms of steps export what prometheus-client's own would."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics, generate_latest

from exeunt.server.step_histogram import StepHistogram

BOUNDS = (0.001, 0.25, 1.0, 60.0)
VALUES = st.one_of(st.sampled_from((0.0, *BOUNDS, 61.0)), st.floats(0.0, 100.0))


@given(st.lists(st.tuples(st.sampled_from("01"), VALUES), max_size=30))
def test_the_exposition_is_that_of_the_librarys_histogram(observed: list[tuple[str, float]]) -> None:
    disable_created_metrics()  # as the server does
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    own = StepHistogram("steps", "Seconds.", ("model", "stage"), [("m", "0"), ("m", "1")], BOUNDS, ours)
    other = Histogram("steps", "Seconds.", ("model", "stage"), buckets=BOUNDS, registry=theirs)
    for stage in "01":
        other.labels("m", stage)
    for stage, value in observed:
        own.child("m", stage).observe(value)
        other.labels("m", stage).observe(value)
    assert generate_latest(ours) == generate_latest(theirs)


def test_a_name_that_the_registry_has_is_refused() -> None:
    registry = CollectorRegistry()
    StepHistogram("steps", "Seconds.", ("model",), [("m",)], BOUNDS, registry)
    with pytest.raises(ValueError, match="steps"):
        StepHistogram("steps", "Seconds.", ("model",), [("m",)], BOUNDS, registry)


def test_other_label_values_than_the_first_ones_are_refused() -> None:
    family = StepHistogram("steps", "Seconds.", ("model",), [("m",)], BOUNDS, CollectorRegistry())
    with pytest.raises(KeyError):
        family.child("another")
