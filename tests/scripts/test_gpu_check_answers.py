"""What the GPU check compares, reads and times by itself: answers, texts over pages, calls."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.compression.graph_pool import ROWS, TOKENS
from exeunt.kernels.int4_linear import quantize
from exeunt.kernels.paged_batch import PagedBatch
from exeunt.kernels.timing import L2_BYTES, cache_bytes, cached, copies, timed
from scripts.gpu_check import correctness, pass_sizes
from scripts.gpu_check.bits import check_bits
from scripts.gpu_check.models import TOY, RandomWeights, random_decoders
from scripts.gpu_check.paged_rows import PagedRows, backfilled_logits, greedy, logits_of, rewritten_logits
from scripts.gpu_check.prompts import packaged_prompts
from tests.compression.recorded_gpu import recorded_gpu
from tests.scripts.toy_gpu_check import CPU, toy_context


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoders(TOY.spec(), CPU, torch.float32)["full", False]


def test_texts_read_in_chunks_are_those_read_in_one_piece(decoder: Decoder) -> None:
    texts = [[3, 5, 8, 13, 21], [1, 2], [34, 55, 89, 144, 233, 377, 610]]
    with torch.inference_mode():
        whole = logits_of(decoder, "full", texts, [100])
        cut = logits_of(decoder, "full", texts, [2, 1])
        alone = [logits_of(decoder, "full", [text], [1])[0] for text in texts]
    for one, other, third, text in zip(whole, cut, alone, texts, strict=True):
        assert one.shape == (len(text), decoder.spec.vocab_size)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
        torch.testing.assert_close(one, third, rtol=0, atol=1e-4)
    assert not torch.allclose(whole[0][0], whole[0][1])


def test_a_greedy_answer_is_the_most_likely_token_each_time(decoder: Decoder) -> None:
    with torch.inference_mode():
        answer = greedy(decoder, "full", [3, 5, 8], 4)
        logits = logits_of(decoder, "full", [[3, 5, 8, *answer]], [100])[0]
    assert answer == logits[2:-1].argmax(-1).tolist()


def test_pages_are_dealt_out_once(decoder: Decoder) -> None:
    rows = PagedRows(decoder, "int4", 3, 100)
    batch = rows.batch([2, 0], [[0, 1, 50], [7]])
    size = rows.layout.page_tokens
    assert batch.positions.tolist() == [0, 1, 50, 7]
    assert batch.query_starts.tolist() == [0, 3, 4]
    assert batch.max_context == 51
    assert batch.slots.tolist() == [
        int(rows.tables[row, p // size]) * size + p % size for row, p in ((2, 0), (2, 1), (2, 50), (0, 7))
    ]
    assert sorted(rows.tables.flatten().tolist()) == list(range(rows.pages.num_pages))


def test_a_text_backfilled_or_read_once_more_with_gaps_is_that_read_in_one_piece(decoder: Decoder) -> None:
    text, beside = [3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610], [1, 2, 4, 8]
    with torch.inference_mode():
        whole = logits_of(decoder, "full", [text], [100])[0]
        for owed in (0, 4, 20):
            late = backfilled_logits(decoder, "full", text, 1, owed)
            torch.testing.assert_close(late, whole, rtol=0, atol=1e-4)
        anew = rewritten_logits(decoder, "full", text, [1, 4, 5], beside)
    torch.testing.assert_close(anew, whole, rtol=0, atol=1e-4)


def test_tokens_read_once_more_are_written_where_others_stood(
    monkeypatch: pytest.MonkeyPatch, decoder: Decoder
) -> None:
    read: list[tuple[list[int], list[int]]] = []
    logits = PagedRows.logits

    def noted(rows: PagedRows, ids: Tensor, batch: PagedBatch) -> Tensor:
        read.append((ids.tolist(), batch.positions.tolist()))
        return logits(rows, ids, batch)

    monkeypatch.setattr(PagedRows, "logits", noted)
    with torch.inference_mode():
        rewritten_logits(decoder, "full", [3, 5, 8, 13, 21], [1, 3], [1, 2])
    assert read[1:] == [([3, 8], [1, 3]), ([5, 13, 2], [1, 3, 1]), ([21], [4])]


@pytest.mark.parametrize("captured", [None, 2, 3])
@pytest.mark.parametrize("off", [False, True])
def test_a_size_that_differs_or_ran_in_no_graph_fails_the_check(
    tmp_path: Path, captured: int | None, off: bool
) -> None:
    graphs: Any = None if captured is None else SimpleNamespace(count=7)
    most = 7 + (captured or 0)
    expected = torch.arange(12.0).view(4, 3)

    def way(count: int) -> Tensor:
        if graphs is not None and graphs.count < most:
            graphs.count += 1
        return expected[:count] + 1e-6 * (off and count == 4)

    ways = {f"{count} tokens": partial(way, count) for count in (1, 2, 4)}
    context = toy_context(tmp_path)
    check_bits(context, "toy", expected, ways, graphs=graphs)
    (made,) = context.report.data["checks"]
    assert made["good"] == (not off and captured != 2)
    assert [*made["differ"]] == (["4 tokens"] if off else [])
    assert made.get("graphs") == captured


@pytest.mark.usefixtures("one_thread")
def test_every_size_of_a_graph_is_run_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, decoder: Decoder
) -> None:
    ran: list[tuple[int, int]] = []
    run_blocks = Decoder.run_blocks

    def noted(decoder: Decoder, hidden: Tensor, batch: PagedBatch, *rest: Any) -> Tensor:
        ran.append((batch.tokens, batch.rows))
        return run_blocks(decoder, hidden, batch, *rest)

    monkeypatch.setattr(Decoder, "run_blocks", noted)
    monkeypatch.setattr(Decoder, "head", lambda decoder, hidden: hidden.clone())
    context = replace(toy_context(tmp_path), quick=False)
    with torch.inference_mode():
        pass_sizes.check_sizes(context, "toy", decoder, "full")
    beyond = [run for run in ran if run[0] > TOKENS[-1]]
    assert [rows for _, rows in beyond] == [1, ROWS[-1]]
    assert [run for run in ran if run not in beyond] == [
        *((size, 1) for size in TOKENS),
        *((size, size) for size in ROWS),
    ]
    assert [one["compared"] for one in context.report.data["checks"]] == [len(TOKENS), len(ROWS)]


@pytest.mark.usefixtures("one_thread")
def test_passes_of_every_size_run_in_graphs_where_there_are_any(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = toy_context(tmp_path)
    with recorded_gpu(monkeypatch) as gpu, torch.inference_mode():
        own = random_decoders(TOY.spec(), CPU, torch.bfloat16)["int4", False]
        pass_sizes.check_sizes(context, "toy", own, "int4")
    made = context.report.data["checks"]
    assert all(one["good"] and one["triton"] for one in made)
    assert [(one["compared"], one["graphs"]) for one in made] == [(3, 3), (2, 2)]
    assert gpu.captures >= 5


@pytest.mark.parametrize("how", ["company", "nothing"])
def test_results_that_depend_on_company_fail_the_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, decoder: Decoder, how: str
) -> None:
    def logits(
        decoder: Decoder, kv: str, texts: Sequence[Sequence[int]], chunks: Sequence[int]
    ) -> list[Tensor]:
        found = [torch.tensor([[float(token), 1.0] for token in text]) for text in texts]
        if how == "company" and len(texts) > 1:
            found[0][3] += 1e-6
        return found

    def alone(decoder: Decoder, kv: str, text: Sequence[int], *rest: Any) -> Tensor:
        return logits(decoder, kv, [text], [1])[0]

    monkeypatch.setattr(correctness, "logits_of", logits)
    monkeypatch.setattr(correctness, "backfilled_logits", alone)
    monkeypatch.setattr(correctness, "rewritten_logits", alone)
    context = toy_context(tmp_path)
    correctness._invariance(context, "toy", decoder, "full")
    (made,) = context.report.data["checks"]
    assert made["good"] == (how == "nothing")
    assert ("among 2" in made["differ"]) == (how == "company")


def test_a_token_that_is_not_the_others_choice_fails_the_check(tmp_path: Path) -> None:
    logits = torch.tensor([[0.0, 5.0], [0.0, 5.0], [3.0, 2.9], [0.0, 0.0]])
    for answer, tolerance, good in (([1, 0], 0.01, True), ([1, 1], 0.2, True), ([1, 1], 0.05, False)):
        context = toy_context(tmp_path)
        correctness._held(context, "toy", [logits[1:]], [answer], tolerance)
        assert context.report.data["checks"][0]["good"] == good


def test_logits_that_are_not_numbers_fail_the_check(tmp_path: Path) -> None:
    context = toy_context(tmp_path)
    correctness._held(context, "toy", [torch.zeros(3, 4), torch.full((3, 4), torch.nan)], [[1, 2]] * 2, 0.1)
    assert not context.report.data["checks"][0]["good"]


def test_one_text_of_several_that_is_off_fails_the_check(tmp_path: Path) -> None:
    right, wrong = torch.tensor([[0.0, 5.0], [0.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 0.0]])
    for texts, good in (([right, right], True), ([right, wrong], False), ([wrong, right], False)):
        context = toy_context(tmp_path)
        correctness._held(context, "toy", texts, [[1], [1]], 0.1)
        (made,) = context.report.data["checks"]
        assert (made["good"], made["tokens"], made["texts"]) == (good, 2, 2)


def test_most_prompts_are_passages_of_a_text(tmp_path: Path, decoder: Decoder) -> None:
    drawn, *passages = correctness._prompts(toy_context(tmp_path), decoder)
    assert passages == packaged_prompts(3, 16)
    assert len({tuple(each) for each in (drawn, *passages)}) == 4


def test_triton_is_off_inside_and_as_before_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXEUNT_TRITON", "1")
    with correctness.without_triton():
        assert os.environ["EXEUNT_TRITON"] == "0"
    assert os.environ["EXEUNT_TRITON"] == "1"


def test_random_int4_weights_have_the_spread_of_full_ones() -> None:
    spec = TOY.spec()
    full = RandomWeights(spec, CPU, torch.float32, None).block(0)["gate_up.weight"]
    block = RandomWeights(spec, CPU, torch.float32, 64).block(0)
    codes = torch.stack((block["gate_up.codes"] & 15, block["gate_up.codes"] >> 4), -1).flatten(1).float()
    int4 = codes * block["gate_up.scales"].float() + block["gate_up.offsets"].float()
    assert int4.std() == pytest.approx(float(full.std()), rel=0.2)
    assert quantize(full, 64).codes.shape == block["gate_up.codes"].shape


def test_buffers_that_take_turns_do_not_fit_the_cache() -> None:
    assert copies(2**25) * 2**25 >= 3 * L2_BYTES
    assert copies(2**25, cache=2**28) * 2**25 == 3 * 2**28
    assert copies(2**40) == 1
    assert not cached(2**25, copies(2**25), cache=L2_BYTES)
    assert cache_bytes(CPU) == L2_BYTES
    calls: list[Callable[[], object]] = [lambda: None, lambda: None]
    assert timed(calls, CPU).method == "clock"


def test_buffers_too_small_and_too_few_to_leave_the_cache_say_so() -> None:
    assert copies(2**20) == 48
    assert cached(2**20, 48, cache=L2_BYTES)
    assert not cached(2**20, 48, cache=2**25)


@pytest.mark.parametrize(("told", "taken"), [(2**26, 2**26), (0, L2_BYTES), (None, L2_BYTES)])
def test_a_device_tells_its_cache(monkeypatch: pytest.MonkeyPatch, told: int | None, taken: int) -> None:
    properties = SimpleNamespace() if told is None else SimpleNamespace(L2_cache_size=told)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert cache_bytes(torch.device("cuda")) == taken


class _Graph:
    """Stands for torch.cuda.CUDAGraph."""

    def replay(self) -> None:
        """Nothing: what was captured is not kept."""


class _Event:
    """Stands for torch.cuda.Event; two milliseconds lie between any two."""

    def __init__(self, enable_timing: bool) -> None:
        self.timed = enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: "_Event") -> float:
        return 2.0


@pytest.mark.parametrize("captured", [True, False])
def test_calls_that_no_graph_takes_are_timed_all_the_same(
    monkeypatch: pytest.MonkeyPatch, captured: bool
) -> None:
    @contextmanager
    def graph(made: _Graph) -> Iterator[None]:
        if not captured:
            raise RuntimeError("not permitted when stream is capturing")
        yield

    for name, stands in {
        "CUDAGraph": _Graph,
        "Event": _Event,
        "graph": graph,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stands)
    made: list[int] = []
    took = timed([lambda: made.append(0), lambda: made.append(1)], torch.device("cuda"))
    assert took.seconds == pytest.approx(1e-3)
    assert took.method.startswith("graph" if captured else "events (RuntimeError: not permitted")
    assert made[:4] == [0, 1, 0, 1]
