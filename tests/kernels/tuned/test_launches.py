"""What a launch finds of what was measured, and when it is left to the rule."""

import threading
import time
from dataclasses import replace

import pytest
import torch

from exeunt.kernels.tuned import files, launches
from exeunt.kernels.tuned.launches import (
    MEASURED_ROWS,
    Launches,
    add_launches,
    forced,
    known_launches,
    leave_to_rule,
    measured_rows,
    tuned_launch,
)
from exeunt.kernels.tuned.shape import LinearShape
from tests.kernels.tuned.measured import FULL, GPU, HALF, INT4, NARROW, WIDE

KNOWN: Launches = {INT4.key(1): NARROW, FULL.key(512): WIDE, FULL.key(1): None}


def _found(tokens: int, shape: LinearShape = INT4) -> launches.TunedLaunch | None:
    return tuned_launch(
        tokens,
        shape.in_features,
        shape.out_features,
        shape.gated,
        shape.dtype,
        int4=shape.int4,
        group_size=shape.group_size if shape.int4 else 0,
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU with a file; the names that were read by."""
    read: list[str] = []

    def known(name: str) -> Launches:
        read.append(name)
        return KNOWN

    monkeypatch.setattr(launches, "_known", {})
    monkeypatch.setattr(launches, "_added", {})
    monkeypatch.setattr(launches, "_has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: GPU)
    monkeypatch.setattr(files, "read_known", known)
    monkeypatch.delenv("EXEUNT_TUNED", raising=False)
    return read


def test_what_was_measured_is_found_and_read_once(gpu: list[str]) -> None:
    assert [_found(tokens) for tokens in (1, 4, 5)] == [NARROW, NARROW, None]
    assert [_found(tokens, FULL) for tokens in (1, 128, 129, 4096)] == [None, None, WIDE, WIDE]
    assert _found(512, HALF) is None
    assert _found(1, replace(INT4, group_size=32)) is None
    assert gpu == [GPU]


def test_rows_stand_for_those_below_them() -> None:
    found = {rows: [t for t in range(1, 200) if measured_rows(t) == rows] for rows in MEASURED_ROWS}
    ends = {rows: (tokens[0], tokens[-1]) for rows, tokens in found.items()}
    assert ends == {
        1: (1, 4),
        8: (5, 8),
        16: (9, 16),
        32: (17, 32),
        64: (33, 64),
        128: (65, 128),
        512: (129, 199),
    }
    assert all(measured_rows(rows) == rows for rows in MEASURED_ROWS)


def test_what_is_added_is_found_from_then_on(gpu: list[str]) -> None:
    add_launches(0, {HALF.key(1): WIDE})
    assert (_found(2, HALF), _found(2)) == (WIDE, NARROW)
    assert known_launches(0).keys() == {*KNOWN, HALF.key(1)}


def test_what_is_left_to_the_rule_is_so_from_then_on(gpu: list[str]) -> None:
    with forced(NARROW):  # a search's: it says nothing of what is known
        assert not leave_to_rule(INT4.key(1))
    assert leave_to_rule(INT4.key(1))
    assert (_found(1), _found(512, FULL)) == (None, WIDE)
    assert not leave_to_rule(INT4.key(1))
    assert not leave_to_rule(HALF.key(1))
    assert known_launches(0).keys() == KNOWN.keys()


def test_threads_lose_nothing_that_another_adds(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(name: str) -> Launches:
        gpu.append(name)
        time.sleep(0.05)
        return KNOWN

    monkeypatch.setattr(files, "read_known", slowly)
    shapes = [LinearShape(64 * each, 64, int4=False) for each in range(1, 9)]
    threads = [threading.Thread(target=add_launches, args=(0, {shape.key(1): WIDE})) for shape in shapes]
    threads.append(threading.Thread(target=known_launches, args=(0,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert known_launches(0).keys() == {*KNOWN, *(shape.key(1) for shape in shapes)}
    assert gpu == [GPU]


def test_a_variable_leaves_all_to_the_rule(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXEUNT_TUNED", "0")
    assert _found(1) is None
    assert gpu == []


def test_a_thread_can_be_told_what_to_run_with(gpu: list[str]) -> None:
    others: list[launches.TunedLaunch | None] = []
    with forced(WIDE):
        assert _found(1) == WIDE
        with forced(None):
            assert _found(1) is None
        assert _found(99, HALF) == WIDE
        thread = threading.Thread(target=lambda: others.append(_found(1)))
        thread.start()
        thread.join()
    assert (_found(1), others) == (NARROW, [NARROW])


@pytest.mark.parametrize("missing", ["gpu", "compiler"])
def test_nothing_is_asked_of_a_gpu_that_is_not_used(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def fails() -> int:
        raise AssertionError("there is no GPU to ask")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: missing != "gpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1" if missing == "compiler" else "0")
    monkeypatch.setattr(torch.cuda, "current_device", fails)
    launches._has_gpu.cache_clear()
    try:
        assert _found(1) is None
    finally:
        launches._has_gpu.cache_clear()
