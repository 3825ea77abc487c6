"""What a capture that fails costs: a warning where the GPU lacks room, an error where something is wrong."""

import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from exeunt.compression import graph_pool
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
    errors = pytest.importorskip("triton.runtime.errors", reason="needs the package triton")
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


def _of_capturing(context: BaseException | None) -> RuntimeError:
    """What the end of a capture raises, in the course of `context`."""
    error = RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")
    error.__context__ = context
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "CUDA out of memory. Tried"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "Triton Error [CUDA]: out of memory"),
        (RuntimeError("CUDA error: operation not permitted when stream is capturing\n"), "CUDA error: operation not"),
        (_of_capturing(None), "CUDA error: operation failed due to a previous error during capture"),
        (_of_capturing(torch.OutOfMemoryError("CUDA out of memory.")), "CUDA out of memory."),
    ],
)  # fmt: skip
def test_what_has_no_room_or_cannot_be_captured_is_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    monkeypatch.setattr(graph_pool, "check_answers", _unasked)
    assert Failing(error).capture("2 rows", _nothing, _nothing) is None
    record = caplog.records[0]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(
        f"A CUDA graph of 2 rows cannot be captured, such passes run without: {said}"
    )


@pytest.mark.parametrize(
    ("error", "goes_on"),
    [
        (_of_capturing(None), False),
        (_of_capturing(torch.OutOfMemoryError("CUDA out of memory.")), False),
        (RuntimeError("CUDA error: operation not permitted when stream is capturing\n"), False),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("no room"), True),
    ],
)
def test_a_capture_that_the_driver_cuts_off_is_the_last(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: Exception, goes_on: bool
) -> None:
    pool = Failing(error)
    monkeypatch.setattr(pool, "_memory", lambda: (100, 100))
    monkeypatch.setattr(graph_pool, "check_answers", lambda device: None)
    assert pool.may_capture(0, 9)
    pool.capture("2 rows", _nothing, _nothing)
    assert pool.may_capture(0, 9) == goes_on
    told = "0 CUDA graphs are captured and the driver cut one off: passes of sizes not yet met run without"
    assert caplog.messages[1:] == ([] if goes_on else [told])
    pool.forget()
    assert pool.may_capture(0, 9) == goes_on


def test_where_there_is_no_memory_the_driver_is_not_asked_at_every_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, asked, free = Failing(RuntimeError()), [0], [0]

    def memory() -> tuple[int, int]:
        asked[0] += 1
        return free[0], 100

    monkeypatch.setattr(pool, "_memory", memory)
    assert not any(pool.may_capture(0, 9) for _ in range(1 + graph_pool.ASKED_AGAIN))
    assert asked == [1]
    free[0] = 100
    assert pool.may_capture(0, 9)
    assert pool.may_capture(0, 9)
    assert asked == [3]


def test_what_graphs_hold_is_not_counted_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, reserved = GraphPool(torch.device("cuda", 0)), [700]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved[0])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 400)
    assert pool._memory() == (350, 1000)
    reserved[0] = 900
    assert pool._grown(700) == 200
    assert pool._memory() == (50 + 500 - 200, 1000)
    reserved[0] = 500
    assert pool._grown(700) == 0
    assert pool._memory() == (50, 1000)
    pool.forget()  # what was let go of is free for all
    assert pool._memory() == (50 + 100, 1000)


def _unasked(device: torch.device) -> None:
    raise AssertionError(f"{device} was asked")


FAULTS = [
    RuntimeError("CUDA error: an illegal memory access was encountered\nmore"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_fault_is_an_error_with_its_traceback(
    caplog: pytest.LogCaptureFixture, fault: Exception, at_the_end: bool
) -> None:
    error = _of_capturing(fault) if at_the_end else fault
    assert Failing(error).capture("2 rows", _nothing, _nothing) is None
    record = caplog.records[0]
    assert record.levelno == logging.ERROR
    assert record.getMessage() == (
        "Capturing a CUDA graph of 2 rows met a fault, such passes run without: RuntimeError: "
        + str(fault).split("\n")[0]
    )
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_a_compiler_that_fails_is_a_fault(caplog: pytest.LogCaptureFixture) -> None:
    errors = pytest.importorskip("triton.runtime.errors", reason="needs the package triton")
    assert Failing(errors.PTXASError("no such option")).capture("2 rows", _nothing, _nothing) is None
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().endswith("run without: PTXASError: PTXAS error: no such option")


def test_a_fault_that_takes_the_device_along_is_raised(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(device: torch.device) -> None:
        raise RuntimeError(f"CUDA error: {device} is lost")

    monkeypatch.setattr(graph_pool, "check_answers", lost)
    pool = Failing(FAULTS[0])
    with pytest.raises(RuntimeError, match="cpu is lost"):
        pool.capture("2 rows", _nothing, _nothing)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert pool.seconds > 0
