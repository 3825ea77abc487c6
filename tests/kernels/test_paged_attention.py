"""Paged attention against attention written out token by token."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from exeunt.kernels.native.library import native_library
from exeunt.kernels.paged_attention import paged_attention
from exeunt.kernels.paged_attention.reference import gather_kv, paged_attention_reference
from exeunt.kernels.paged_batch import PagedBatch
from exeunt.kernels.write_kv import rotate, write_kv

Make = Callable[..., Any]
ROWS = [[0, 1, 2, 3, 4], [33], [15, 16, 31, 40], [0], [47]]


def plain_attention(problem: Any, scale: float, window: int | None) -> torch.Tensor:
    """Attention of each token over its row's keys, written out."""
    out = torch.empty_like(problem.queries, dtype=torch.float32)
    starts = problem.batch.query_starts.tolist()
    group = problem.queries.shape[1] // problem.block.keys.shape[1]
    for row, (keys, values) in enumerate(zip(problem.keys, problem.values, strict=True)):
        for token in range(starts[row], starts[row + 1]):
            position = int(problem.batch.positions[token])
            first = 0 if window is None else max(0, position - window + 1)
            seen = slice(first, position + 1)
            for head in range(problem.queries.shape[1]):
                query = problem.queries[token, head].float()
                scores = keys[seen, head // group].float() @ query * scale
                out[token, head] = scores.softmax(0) @ values[seen, head // group].float()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 7, 16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (5, 1, 5), (3, 3, 123)])
def test_full_pages_equal_plain_attention(
    paged_problem: Make, dtype: torch.dtype, window: int | None, heads: int, kv_heads: int, head_dim: int
) -> None:
    problem = paged_problem(ROWS, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    expected = plain_attention(problem, 0.3, window)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for attend in (paged_attention, paged_attention_reference):
        out = attend(problem.queries, problem.block, problem.batch, 0.3, window)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_tokens"),
    [(4, 2, 16, 16), (7, 1, 80, 57), (5, 5, 24, 3), (8, 2, 128, 1)],
)
def test_int4_pages_equal_plain_attention_over_what_they_hold(
    paged_problem: Make,
    dtype: torch.dtype,
    window: int | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_tokens: int,
) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_tokens": page_tokens}
    problem = paged_problem(ROWS, dtype=dtype, int4=True, **shape)
    held = []
    for row, keys in enumerate(problem.keys):
        context = len(keys)
        tables = problem.batch.page_tables[row : row + 1, : -(-context // page_tokens)].long()
        held.append([part[0].transpose(0, 1) for part in gather_kv(problem.block, tables, context)])
    # Rotating back (the rotation is its own inverse) gives the keys as attention without a rotation sees them.
    stored = type(problem)(
        problem.queries, problem.block, problem.batch, [rotate(k) for k, _ in held], [v for _, v in held]
    )
    expected = plain_attention(stored, 0.3, window)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 1e-2}[dtype]
    for attend in (paged_attention, paged_attention_reference):
        out = attend(problem.queries, problem.block, problem.batch, 0.3, window)
        torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)
    exact = plain_attention(problem, 0.3, window)
    assert float((expected - exact).norm() / exact.norm()) < 0.25  # four bits, normal values: some 10 %


def subset(batch: PagedBatch, tokens: list[int], rows: list[int], starts: list[int]) -> PagedBatch:
    """The batch of some tokens of some rows, with a longer table full of nonsense at its end."""
    tables = torch.full((len(rows), batch.page_tables.shape[1] + 3), -7, dtype=torch.int32)
    tables[:, : batch.page_tables.shape[1]] = batch.page_tables[rows]
    return PagedBatch(
        batch.positions[tokens],
        batch.slots[tokens],
        torch.tensor(starts, dtype=torch.int32),
        tables,
        int(batch.positions[tokens].max()) + 1,
    )


@pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize("window", [None, 21])
def test_a_token_does_not_see_the_batch(paged_problem: Make, int4: bool, window: int | None) -> None:
    rows = [list(range(40)), [70], [3, 9, 64], [0]]
    problem = paged_problem(rows, heads=6, kv_heads=2, head_dim=48, page_tokens=24, int4=int4)
    whole = paged_attention(problem.queries, problem.block, problem.batch, 0.2, window)

    def attend(tokens: list[int], of_rows: list[int], starts: list[int]) -> torch.Tensor:
        batch = subset(problem.batch, tokens, of_rows, starts)
        return paged_attention(problem.queries[tokens], problem.block, batch, 0.2, window)

    for token, row in [(0, 0), (17, 0), (39, 0), (40, 1), (41, 2), (43, 2), (44, 3)]:  # each alone
        assert torch.equal(attend([token], [row], [0, 1])[0], whole[token])
    chunk = list(range(13, 29))  # a chunk of the prefill
    assert torch.equal(attend(chunk, [0], [0, 16]), whole[chunk])
    order = [44, 41, 42, 43, 5, 40]  # decode beside it, rows in another order
    assert torch.equal(attend(order, [3, 2, 0, 1], [0, 1, 4, 5, 6]), whole[order])


@pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)
@pytest.mark.parametrize("int4", [False, True])
def test_one_and_two_threads_agree(paged_problem: Make, int4: bool) -> None:
    problem = paged_problem([list(range(200)), [150]], heads=4, kv_heads=2, head_dim=64, int4=int4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = paged_attention(problem.queries, problem.block, problem.batch, 0.2, None)
        torch.set_num_threads(2)
        assert torch.equal(paged_attention(problem.queries, problem.block, problem.batch, 0.2, None), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize("attend", [paged_attention, paged_attention_reference])
def test_what_a_later_token_wrote_reaches_no_earlier_one(
    paged_problem: Make, attend: Callable[..., torch.Tensor], int4: bool
) -> None:
    problem = paged_problem([[4, 5, 6, 7, 8, 9]], heads=6, kv_heads=2, head_dim=48, int4=int4)
    before = attend(problem.queries, problem.block, problem.batch, 0.2, None)
    key, value = problem.keys[0][7:8], problem.values[0][7:8]
    for keys, values in ((torch.full_like(key, torch.inf), value), (key, torch.full_like(value, torch.inf))):
        write_kv(keys, values, problem.batch.slots[3:4], problem.block)
        after = attend(problem.queries, problem.block, problem.batch, 0.2, None)
        assert torch.equal(after[:3], before[:3])
        assert not after[3:].isfinite().any()


@pytest.mark.parametrize("int4", [False, True])
def test_an_empty_batch_and_strided_queries(paged_problem: Make, int4: bool) -> None:
    problem = paged_problem([[5], [20, 21]], int4=int4)
    fused = torch.randn(3, 4 * 16 + 32)
    queries = fused[:, :64].reshape(3, 4, 16)
    strided = fused.as_strided((3, 4, 16), (96, 16, 1))
    out = paged_attention(strided, problem.block, problem.batch, 0.2)
    assert torch.equal(out, paged_attention(queries.contiguous(), problem.block, problem.batch, 0.2))
    nothing = PagedBatch(
        torch.empty(0, dtype=torch.int64),
        torch.empty(0, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int32),
        torch.empty((0, 4), dtype=torch.int32),
        0,
    )
    for attend in (paged_attention, paged_attention_reference):
        assert attend(torch.empty(0, 4, 16), problem.block, nothing, 0.2, None).shape == (0, 4, 16)


def test_scores_far_apart_do_not_overflow(paged_problem: Make) -> None:
    problem = paged_problem([[60], list(range(20))])
    expected = plain_attention(problem, 500.0, None)
    out = paged_attention(problem.queries, problem.block, problem.batch, 500.0)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_long_prefill_does_not_need_memory_for_all_scores(paged_problem: Make) -> None:
    problem = paged_problem([list(range(700))], heads=2, kv_heads=1, head_dim=8)
    out = paged_attention_reference(problem.queries, problem.block, problem.batch, 0.3, None)
    torch.testing.assert_close(
        out, paged_attention(problem.queries, problem.block, problem.batch, 0.3), atol=1e-5, rtol=1e-5
    )


def test_what_does_not_fit_is_refused_with_the_reason(paged_problem: Make) -> None:
    problem = paged_problem([[5]])
    with pytest.raises(ValueError, match="3 query heads do not share 2 KV heads"):
        paged_attention(torch.randn(1, 3, 16), problem.block, problem.batch, 0.2)
    with pytest.raises(ValueError, match="head_dim 8, the pages hold 16"):
        paged_attention(torch.randn(1, 4, 8), problem.block, problem.batch, 0.2)
    with pytest.raises(ValueError, match="window is 0"):
        paged_attention(problem.queries, problem.block, problem.batch, 0.2, 0)


def test_a_batch_of_another_size_is_refused(paged_problem: Make) -> None:
    problem = paged_problem([[3, 4]])
    queries = torch.cat([problem.queries, problem.queries])
    with pytest.raises(ValueError, match="there are 4 queries, the batch has 2 tokens"):
        paged_attention(queries, problem.block, problem.batch, 1.0)


def test_a_deep_copy_of_a_batch_is_described_anew(paged_problem: Make) -> None:
    problem = paged_problem([[3, 4]])
    expected = paged_attention(problem.queries, problem.block, problem.batch, 0.3)
    copied = copy.deepcopy(problem.batch)
    problem.batch.positions.zero_()
    assert torch.equal(paged_attention(problem.queries, problem.block, copied, 0.3), expected)
