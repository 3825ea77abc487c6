"""Counters of steps export what prometheus-client's own would, and refuse what it would refuse."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, disable_created_metrics, generate_latest

from exeunt.server.step_counter import Count, StepCounter


@given(st.lists(st.tuples(st.sampled_from("01"), st.floats(0.0, 1e6)), max_size=30))
def test_the_exposition_is_that_of_the_librarys_counter(counted: list[tuple[str, float]]) -> None:
    disable_created_metrics()  # as the server does
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    own = StepCounter("tokens", "Tokens.", ("model", "mode"), [("m", "0"), ("m", "1")], ours)
    other = Counter("tokens", "Tokens.", ("model", "mode"), registry=theirs)
    for mode in "01":
        other.labels("m", mode)
    for mode, amount in counted:
        own.child("m", mode).add(amount)
        other.labels("m", mode).inc(amount)
    assert generate_latest(ours) == generate_latest(theirs)


@pytest.mark.parametrize("amount", [-1, -1e-9, math.nan])
def test_less_than_nothing_is_not_counted(amount: float) -> None:
    count = Count()
    with pytest.raises(ValueError, match="a counter only grows"):
        count.add(amount)
    assert count.value == 0.0


def test_a_name_that_the_registry_has_is_refused() -> None:
    registry = CollectorRegistry()
    StepCounter("tokens", "Tokens.", ("model",), [("m",)], registry)
    with pytest.raises(ValueError, match="tokens"):
        StepCounter("tokens", "Tokens.", ("model",), [("m",)], registry)
