"""The recorder of graphs refuses what a GPU refuses, and replays operators over memory, not Python."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from exeunt.compression.graph_pool import Captured
from exeunt.compression.row_graphs import StepGraphs
from tests.compression.recorded_graphs import RecordedPool, RecordingError

MASK = torch.tensor([True, False, True])


@pytest.fixture
def pool() -> RecordedPool:
    return RecordedPool()


def _nothing() -> None:
    return None


def _captured(pool: RecordedPool, run: Callable[[], Any]) -> Captured[Any]:
    found = pool.capture("it", _nothing, run)
    assert found is not None, pool.refused
    return found


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda x: bool(x.any()), "_local_scalar_dense"),
        (lambda x: x[0].item(), "_local_scalar_dense"),
        (lambda x: torch.equal(x, x), "aten.equal"),
        (lambda x: x.tolist(), "tolist waits"),
        (lambda x: x.numpy(), "numpy waits"),
        (lambda x: x.cpu(), "cpu waits"),
        (lambda x: x.nonzero(), "aten.nonzero"),
        (lambda x: torch.where(x > 0), "aten.nonzero"),
        (lambda x: x.masked_select(MASK), "aten.masked_select"),
        (lambda x: x.long().bincount(), "aten.bincount"),
        (lambda x: x.repeat_interleave(x.long()), "aten.repeat_interleave"),
        (lambda x: x[MASK], "by a mask"),
        (lambda x: x.index_put_((MASK,), 2 * x[:2]), "by a mask"),
        (lambda x: x + torch.tensor(1.0), "tensor copies numbers"),
        (lambda x: x + x.new_tensor([1.0, 2.0, 3.0]), "new_tensor copies numbers"),
        (lambda x: x[[0, 2]], "a list of numbers"),
    ],
)
def test_what_waits_or_has_no_shape_of_its_own_or_comes_from_the_host_is_refused(
    pool: RecordedPool, run: Callable[[Tensor], object], why: str
) -> None:
    x = torch.arange(3.0)
    assert pool.capture("it", _nothing, lambda: run(x)) is None
    (refused,) = pool.refused
    assert refused.startswith("operation not permitted when stream is capturing: ")
    assert why in refused
    assert pool.captures == pool.count == 0


def test_what_a_gpu_can_do_is_recorded(pool: RecordedPool) -> None:
    x, at = torch.arange(3.0), torch.tensor([2, 0])

    def run() -> Tensor:
        chosen = torch.where(MASK, x, -x).masked_fill(x > 1, 7.0)
        parts = torch.cat([chosen[at], chosen.index_select(0, at), torch.full((1,), 0.5)])
        parts[1:2] += torch.arange(4, device="cpu")[3]
        return parts.reshape(5, 1).expand(5, 2).contiguous()

    graph = _captured(pool, run)
    for _ in range(2):
        x += 1
        graph.replay()
        assert torch.equal(graph.result, run())
    assert (pool.captures, pool.replays, pool.refused) == (1, 2, [])


def test_a_capture_computes_nothing(pool: RecordedPool) -> None:
    counter, seen = torch.zeros(2), list[tuple[list[float], bool]]()
    pool.computed_nothing = lambda result: seen.append((counter.tolist(), bool(result.isnan().all())))  # type: ignore[method-assign]
    graph = _captured(pool, lambda: counter.add_(1)[:1] * 2)
    assert seen == [([1, 1], True)], "the run in front of the capture alone has computed anything"
    assert counter.tolist() == [2, 2], "and then the first launch"
    assert pool.replays == 0
    graph.replay()
    assert counter.tolist() == [3, 3]
    assert graph.result.tolist() == [6]


def test_what_python_says_it_says_once(pool: RecordedPool) -> None:
    x, calls = torch.ones(2), list[int]()

    def run() -> Tensor:
        calls.append(1)
        return x * len(calls)

    graph = _captured(pool, run)
    for _ in range(2):
        graph.replay()
        assert graph.result.tolist() == [2, 2]
    assert len(calls) == 2


def test_memory_that_was_freed_is_not_read(pool: RecordedPool) -> None:
    held, out = [torch.ones(3)], torch.zeros(3)
    graph = _captured(pool, lambda: out.copy_(held[0]))
    graph.replay()
    held.clear()
    with pytest.raises(RecordingError, match="freed"):
        graph.replay()
    assert len(pool.refused) == pool.replays == 1


def test_memory_that_was_freed_is_not_written_either(pool: RecordedPool) -> None:
    held = [torch.ones(3)]

    def run() -> None:
        held[0].mul_(2)

    graph = _captured(pool, run)
    held[0] = held[0].clone()
    with pytest.raises(RecordingError, match="freed"):
        graph.replay()


@pytest.mark.parametrize("kept", [True, False])
def test_a_graph_that_reads_its_callers_tensor_shows(pool: RecordedPool, kept: bool) -> None:
    """In the place of what it is given, which is copied to where graphs read."""
    graphs, given = StepGraphs(pool), [torch.full((4,), 1.0)]
    first = given[0] if kept else None

    def ask() -> Tensor:
        found = graphs.run(("wrong",), lambda rows: (given[0] + 1,), given[0])
        assert found is not None
        return found[0].clone()

    assert ask().tolist() == [2] * 4
    given[0] = torch.full((4,), 5.0)
    if kept:
        assert ask().tolist() == [2] * 4, "of what the capture saw"
    else:
        with pytest.raises(RecordingError, match="freed"):
            ask()
    del first


def test_what_is_left_in_scratch_is_nobodys(pool: RecordedPool) -> None:
    x, left = torch.ones(3), list[Tensor]()

    def run() -> Tensor:
        left[:] = [x * 2]
        return left[0] + 1

    graph = _captured(pool, run)
    other = _captured(pool, lambda: left[0] * 1)
    for _ in range(2):
        graph.replay()
        assert graph.result.tolist() == [3, 3, 3]
        other.replay()
        assert other.result.isnan().all()


def test_what_nobody_wrote_is_nan(pool: RecordedPool) -> None:
    def run() -> Tensor:
        room = torch.empty(3)
        room[:2] = 1
        return room.clone()

    graph = _captured(pool, run)
    graph.replay()
    assert graph.result[:2].tolist() == [1, 1]
    assert graph.result[2].isnan()


def test_what_a_graph_left_is_overwritten_before_it_runs_again(pool: RecordedPool) -> None:
    graph = _captured(pool, lambda: torch.empty(2))
    with torch.inference_mode():
        graph.result.fill_(1)
    graph.replay()
    assert graph.result.isnan().all()
