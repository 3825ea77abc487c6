"""Row-wise functions as graphs: sizes, padding, limits, what is counted and let go of; heads, gates, without a GPU."""

import gc
import logging
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import exeunt.compression.gate_steps as gate_steps
from exeunt.compression.decoder import Decoder
from exeunt.compression.exit_output import ExitOutput, Shortlist
from exeunt.compression.exits import ExitConfirmation
from exeunt.compression.graph_pool import ASKED_AGAIN, MOST_MEMORY, ROWS, SPARE_MEMORY, size_for
from exeunt.compression.host_memory import fetched, integers_on_host, sent, staged
from exeunt.compression.row_graphs import MOST_ROW_GRAPHS, StepGraphs
from tests.compression.exit_heads import (
    HIDDEN,
    SHORTLIST,
    exit_confirmation,
    exit_head,
    exit_judge,
    exit_outputs,
)
from tests.compression.fake_graphs import GROWN, TOTAL, FakePool
from tests.compression.reference_models import build_model, save

KEY = ("doubling",)


class Doubling:
    """Twice its first tensor, and its rows' sums with the second; remembers the rows of every call."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, more: Tensor) -> tuple[Tensor, ...]:
        self.rows.append(len(x))
        return 2 * x, (x.sum(1) + more).double()


def asked(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3), torch.randn(rows)


@pytest.fixture
def pool() -> FakePool:
    return FakePool()


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("llama")
    return Decoder.load(save(build_model("llama", num_hidden_layers=1), folder))


@pytest.fixture
def graphs(pool: FakePool) -> StepGraphs:
    return StepGraphs(pool)


def test_sizes_are_the_next_ones_up() -> None:
    assert [size_for(n, ROWS) for n in (0, 1, 2, 3, 5, 9, 17, 65, 97, 128, 129)] == [
        *(None, 1, 2, 4, 8, 16, 24, 96, 128, 128, None),
    ]
    assert [size_for(n) for n in (128, 129, 257, 512, 513)] == [128, 192, 320, 512, None]


def test_a_call_runs_as_one_of_the_next_size_and_is_captured_once(graphs: StepGraphs, pool: FakePool) -> None:
    double = Doubling()
    for rows in (3, 4, 1, 3, 128, 100, 3):
        x, more = asked(rows)
        found = graphs.run(KEY, double, x, more)
        assert found is not None
        assert torch.equal(found[0], 2 * x)
        assert torch.equal(found[1], (x.sum(1) + more).double())
    assert set(double.rows) == {4, 1, 128}
    assert pool.captures == pool.count == graphs.count == 3


@pytest.mark.parametrize("rows", [0, 129])
def test_no_rows_and_too_many_run_without(graphs: StepGraphs, pool: FakePool, rows: int) -> None:
    assert graphs.run(KEY, Doubling(), *asked(rows)) is None
    assert pool.captures == 0


def test_what_stands_in_padded_rows_does_not_matter(graphs: StepGraphs) -> None:
    graphs.run(KEY, Doubling(), torch.full((8, 3), torch.nan), torch.full((8,), torch.inf))
    x, more = asked(5)
    found = graphs.run(KEY, Doubling(), x, more)
    assert found is not None
    assert torch.equal(found[0], 2 * x)


def test_results_hold_until_the_next_call_and_all_functions_share_them(graphs: StepGraphs) -> None:
    x = torch.ones(2, 3)
    first = graphs.run(("one",), lambda x: (2 * x,), x)
    assert first is not None
    kept = first[0].clone()
    second = graphs.run(("other",), lambda x: (3 * x,), x)
    assert second is not None
    assert second[0].data_ptr() == first[0].data_ptr()
    assert torch.equal(second[0], 3 * x)
    assert torch.equal(kept, 2 * x)
    wide = graphs.run(("wide",), lambda x: (x.double() / 3,), x)
    assert wide is not None
    assert torch.equal(wide[0], x.double() / 3)


def test_a_capture_that_fails_is_told_of_once_and_not_tried_again(
    graphs: StepGraphs, pool: FakePool, caplog: pytest.LogCaptureFixture
) -> None:
    pool.failing = True
    with caplog.at_level(logging.WARNING):
        assert [graphs.run(KEY, Doubling(), *asked(2)) for _ in range(3)] == [None] * 3
    (record,) = caplog.records
    assert record.message == (
        "A CUDA graph of doubling of 2 rows cannot be captured, such passes run without: out of memory"
    )
    assert pool.captures == 1
    assert pool.count == graphs.count == 0
    pool.failing = False
    assert graphs.run(KEY, Doubling(), *asked(1)) is not None


def test_memory_is_left_free(graphs: StepGraphs, pool: FakePool, caplog: pytest.LogCaptureFixture) -> None:
    pool.free = int(TOTAL * SPARE_MEMORY)
    assert graphs.run(KEY, Doubling(), *asked(1)) is not None
    pool.free -= 1
    with caplog.at_level(logging.WARNING):
        assert [graphs.run(KEY, Doubling(), *asked(2)) for _ in range(3)] == [None] * 3
    assert [record.message for record in caplog.records] == [
        f"1 CUDA graphs are captured and {pool.free} of {TOTAL} bytes are free: "
        "passes of sizes not yet met run without"
    ]
    assert graphs.run(KEY, Doubling(), *asked(1)) is not None
    pool.free = TOTAL
    for _ in range(ASKED_AGAIN):
        if graphs.run(KEY, Doubling(), *asked(2)) is not None:
            break
    assert graphs.run(KEY, Doubling(), *asked(2)) is not None


def test_graphs_take_a_share_of_the_memory_and_no_more(
    graphs: StepGraphs, pool: FakePool, caplog: pytest.LogCaptureFixture
) -> None:
    pool.note(int(TOTAL * MOST_MEMORY) - GROWN)
    with caplog.at_level(logging.WARNING):
        assert graphs.run(KEY, Doubling(), *asked(1)) is not None
        assert [graphs.run(KEY, Doubling(), *asked(2)) for _ in range(3)] == [None] * 3
    (record,) = caplog.records
    assert f"and they take {pool.nbytes} of {TOTAL} bytes: passes of sizes not yet met" in record.message
    assert graphs.run(KEY, Doubling(), *asked(1)) is not None
    graphs.release()
    assert graphs.run(KEY, Doubling(), *asked(2)) is not None
    pool.note(int(TOTAL * MOST_MEMORY) - pool.nbytes)  # a share is what they may take, and not a byte more
    assert graphs.run(KEY, Doubling(), *asked(1)) is None
    assert len(caplog.records) == 2, "a release begins anew, and is told anew when that is over"


def test_graphs_have_a_bound(graphs: StepGraphs, pool: FakePool) -> None:
    for number in range(MOST_ROW_GRAPHS + 5):
        found = graphs.run(("f", number), Doubling(), *asked(1))
        assert (found is None) == (number >= MOST_ROW_GRAPHS)
    assert graphs.count == pool.captures == MOST_ROW_GRAPHS


def test_what_graphs_take_is_counted_and_given_back(graphs: StepGraphs, pool: FakePool) -> None:
    double = Doubling()
    graphs.run(KEY, double, *asked(3))
    rows = ROWS[-1]
    inputs, outputs = rows * (3 + 1) * 4, rows * (3 * 4 + 8)
    assert pool.nbytes == inputs + outputs + GROWN
    graphs.run(KEY, double, *asked(5))
    assert pool.nbytes == inputs + outputs + 2 * GROWN
    graphs.run(("other",), Doubling(), *asked(5))  # the outputs are shared
    assert pool.nbytes == 2 * inputs + outputs + 3 * GROWN
    assert pool.seconds > 0
    seconds, held = pool.seconds, weakref.ref(double)
    del double
    graphs.release()
    gc.collect()
    assert held() is None
    assert (pool.nbytes, pool.count, graphs.count, pool.seconds) == (0, 0, 0, seconds)
    assert graphs.run(KEY, Doubling(), *asked(3)) is not None
    assert pool.nbytes == inputs + outputs + GROWN


def test_a_head_is_that_without_graphs(decoder: Decoder) -> None:
    hidden = torch.randn(5, decoder.spec.hidden_size)
    plain = decoder.head(hidden)
    decoder._step_graphs = StepGraphs(FakePool())
    captured = decoder.head(hidden)
    torch.testing.assert_close(captured, plain)
    decoder.head(torch.randn(5, decoder.spec.hidden_size))
    torch.testing.assert_close(captured, plain)  # a copy: nothing that runs later changes it
    assert decoder._step_graphs.count == 1
    assert decoder.resident_bytes()["cuda_graphs"] == decoder._step_graphs.pool.nbytes > 0
    assert len(decoder.head(torch.randn(200, decoder.spec.hidden_size))) == 200
    held = decoder.step_graphs
    assert held is not None
    decoder.release_graphs()
    assert decoder.step_graphs is None
    assert held.count == decoder.resident_bytes()["cuda_graphs"] == 0


def test_nothing_is_captured_on_a_cpu(decoder: Decoder) -> None:
    assert decoder.capture(64) is None
    assert decoder.step_graphs is None


@pytest.mark.parametrize(
    ("listed", "last"), [(None, None), (SHORTLIST, None), (SHORTLIST, exit_confirmation())]
)
def test_a_gate_is_that_without_graphs_and_waits_once(
    listed: Shortlist | None, last: ExitConfirmation | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exeunt.compression.exits.triton_runs", lambda device: True)
    waits: list[torch.Size] = []

    def counted(tensor: Tensor) -> Tensor:
        waits.append(tensor.shape)
        return fetched(tensor)

    monkeypatch.setattr(gate_steps, "fetched", counted)
    head = replace(exit_head(), shortlist=listed, judge=exit_judge(), confirmation=last)
    output, plain = exit_outputs(torch.float32)[0], exit_outputs(torch.float32)[0]
    graphs = StepGraphs(FakePool())
    output.replay_in(graphs)
    hidden = torch.randn(11, HIDDEN, generator=torch.Generator().manual_seed(1))
    for threshold in (0.5, 0.0, torch.inf):
        thresholds = torch.full((11,), threshold)
        waits.clear()
        found = head.gate(hidden, thresholds, output)
        assert waits == [(11, 4)]
        expected = head.gate(hidden, thresholds, plain)
        head.gate(torch.randn(11, HIDDEN), thresholds, output)  # what was found is kept by nobody's graph
        torch.testing.assert_close(found.confidence, expected.confidence)
        assert torch.equal(found.leaves, expected.leaves)
        assert torch.equal(found.looked, expected.looked)
        assert torch.equal(found.whole, expected.whole)
        torch.testing.assert_close(found.logits, expected.logits)
        assert {0.5: 0 < int(found.leaves.sum()) < 11, 0.0: bool(found.leaves.all())}.get(
            threshold, len(found.logits) == 0
        )
    if listed is None or last is not None:
        assert graphs.count == 1, "the gate alone: what confirms it is what rows that leave say"
    else:
        assert graphs.count >= 3  # the gate, and the projection of some and of all


def test_gates_of_two_exits_are_two_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exeunt.compression.exits.triton_runs", lambda device: True)
    output, plain = exit_outputs(torch.float32)[0], exit_outputs(torch.float32)[0]
    graphs = StepGraphs(FakePool())
    output.replay_in(graphs)
    hidden, thresholds = torch.randn(4, HIDDEN), torch.zeros(4)
    for head in (exit_head(block=1, seed=4), exit_head(block=3, seed=5)):
        found = head.gate(hidden, thresholds, output)
        expected = head.gate(hidden, thresholds, plain)
        torch.testing.assert_close(found.confidence, expected.confidence)
    assert graphs.count == 2


def test_a_gate_of_many_rows_runs_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exeunt.compression.exits.triton_runs", lambda device: True)
    output: ExitOutput = exit_outputs(torch.float32)[0]
    graphs = StepGraphs(FakePool())
    output.replay_in(graphs)
    rows = gate_steps.ROWS_AT_ONCE + 200  # decided in two goes, each by its own thresholds
    thresholds = torch.zeros(rows)
    thresholds[-150:] = torch.inf
    hidden = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(1))
    found = exit_head().gate(hidden, thresholds, output)
    assert torch.equal(found.leaves, thresholds == 0)
    some = exit_head().gate(hidden[-170:-140], thresholds[-170:-140], output)
    torch.testing.assert_close(some.confidence, found.confidence[-170:-140])
    torch.testing.assert_close(some.logits, found.logits[-20:])
    assert graphs.count == 1  # of these few


def test_on_the_host_nothing_is_pinned() -> None:
    device = torch.device("cpu")
    numbers = integers_on_host(3, device)
    numbers.numpy()[:] = (4, 5, 6)
    assert sent(numbers.numpy(), device).tolist() == staged(numbers.numpy(), device).tolist() == [4, 5, 6]
    copy = fetched(numbers)
    numbers.zero_()
    assert copy.tolist() == [4, 5, 6]
