"""What a capture that fails costs: a warning, whoever raised."""

import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from exeunt.compression.graph_pool import Captured, GraphPool


class Failing(GraphPool):
    """Captures nothing: each raises `error`."""

    def __init__(self, error: Exception) -> None:
        super().__init__(torch.device("cpu"))
        self._error = error

    def _record(self, run: Callable[[], Any]) -> Captured[Any]:
        raise self._error


def _nothing() -> None:
    return None


def test_a_kernel_that_does_not_fit_leaves_a_pass_without_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    errors = pytest.importorskip("triton.runtime.errors")
    error = errors.OutOfResources(300000, 232448, "shared memory")
    with caplog.at_level(logging.WARNING):
        assert Failing(error).capture("2 rows", _nothing, _nothing) is None
    (message,) = caplog.messages
    assert message.startswith(
        "A CUDA graph of 2 rows cannot be captured, such passes run without: out of resource"
    )


def test_a_mistake_in_the_code_is_none_of_them() -> None:
    with pytest.raises(KeyError):
        Failing(KeyError("x")).capture("2 rows", _nothing, _nothing)


def test_without_triton_torchs_errors_are_those_there_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton.errors", None)
    assert Failing(RuntimeError("out of memory")).capture("2 rows", _nothing, _nothing) is None
    assert len(caplog.messages) == 1
