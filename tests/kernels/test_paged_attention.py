"""Paged attention against attention written out token by token."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from exeunt.kernels.native.library import native_library
from exeunt.kernels.paged_attention import paged_attention
from exeunt.kernels.paged_attention.reference import gather_kv, paged_attention_reference
from exeunt.kernels.paged_batch import KVBlock, PagedBatch
from exeunt.kernels.write_kv import rotate, write_kv

Make = Callable[..., Any]
ROWS = [[0, 1, 2, 3, 4], [33], [15, 16, 31, 40], [0], [47]]
# Around the borders of the spans of 64 or 128 keys at absolute positions that weights of INT4 values are rounded in.
LONG_ROWS = [[0, 1, 300], [62, 63, 64, 65, 66], [126, 127, 128, 129], [255, 256, 319], [340]]

needs_native = pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)


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


def exact_attention(problem: Any, scale: float, window: int | None) -> torch.Tensor:
    """Attention in float64 over what the pages hold."""
    block, batch = problem.block, problem.batch
    out = torch.empty(problem.queries.shape, dtype=torch.float64)
    queries = (rotate(problem.queries) if block.is_int4 else problem.queries).double()
    group = queries.shape[1] // block.keys.shape[1]
    starts = batch.query_starts.tolist()
    for row, keys in enumerate(problem.keys):
        context, tokens = len(keys), slice(starts[row], starts[row + 1])
        tables = batch.page_tables[row : row + 1, : -(-context // block.page_tokens)].long()
        held = [part[0].double().repeat_interleave(group, 0) for part in gather_kv(block, tables, context)]
        places, positions = torch.arange(context), batch.positions[tokens, None]
        seen = places <= positions
        if window is not None:
            seen &= places > positions - window
        scores = torch.einsum("thd,hkd->thk", queries[tokens], held[0]) * scale
        weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        out[tokens] = torch.einsum("thk,hkd->thd", weights, held[1])
    return out


def error(out: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """How far each token's heads are off, as a share of their norm: [tokens, heads]."""
    away: torch.Tensor = torch.linalg.vector_norm(out.double() - exact, dim=-1)
    whole: torch.Tensor = torch.linalg.vector_norm(exact, dim=-1)
    return away.div(whole)


def tensors(block: KVBlock) -> list[torch.Tensor]:
    """What holds a block's keys and values."""
    return [t for t in (block.keys, block.values, block.key_params, block.value_params) if t is not None]


def write_again(problem: Any) -> None:
    """Write a problem's keys and values, which may be others now, to their places."""
    page_tokens = problem.block.page_tokens
    for table, keys, values in zip(problem.batch.page_tables, problem.keys, problem.values, strict=True):
        places = torch.arange(len(keys))
        slots = table.long()[places // page_tokens] * page_tokens + places % page_tokens
        write_kv(keys, values, slots, problem.block)


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


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_tokens"),
    [
        (1, 1, 16, 31),
        (4, 2, 24, 7),
        (3, 1, 32, 31),
        (8, 2, 64, 57),
        (5, 1, 80, 5),
        (2, 2, 96, 16),
        (5, 1, 128, 8),
        (6, 3, 256, 24),
    ],
)
def test_contexts_of_several_spans(
    paged_problem: Make,
    dtype: torch.dtype,
    int4: bool,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_tokens: int,
) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_tokens": page_tokens}
    problem = paged_problem(LONG_ROWS, dtype=dtype, int4=int4, **shape)
    scale = head_dim**-0.5
    for window in (None, 37, 150):
        out = paged_attention(problem.queries, problem.block, problem.batch, scale, window)
        exact = exact_attention(problem, scale, window)
        assert float(error(out, exact).max()) < {torch.float32: 2e-5, torch.bfloat16: 4e-3}[dtype]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("place", [3, 200, 339])
@pytest.mark.parametrize("int4", [False, True])
def test_small_weights_count_beside_one_that_dominates(paged_problem: Make, int4: bool, place: int) -> None:
    """Where the value of a key of weight e^20 is 0, the others are all that is left."""
    problem = paged_problem([[338, 339]], heads=5, kv_heads=1, head_dim=64, int4=int4)
    towards = torch.randn(64)
    problem.queries.mul_(0.2).add_(towards)
    problem.keys[0].mul_(0.1)
    problem.keys[0][place] = towards * 20.0 / (0.125 * towards.square().sum())
    value = problem.values[0][place].clone()
    for factor in (0.0, 1.0):
        problem.values[0][place] = value * factor
        write_again(problem)
        out = paged_attention(problem.queries, problem.block, problem.batch, 0.125)
        assert float(error(out, exact_attention(problem, 0.125, None)).max()) < 1e-4


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("int4", [False, True])
def test_many_weights_that_round_to_nothing(paged_problem: Make, int4: bool) -> None:
    """All keys but one weigh e^-16 of it, over INT4 pages half a step of what a span's weights are rounded to."""
    problem = paged_problem([[127]], heads=4, kv_heads=1, head_dim=64, int4=int4)
    towards = torch.randn(64)
    problem.queries.copy_(towards.expand(1, 4, 64))
    problem.keys[0].zero_()
    problem.keys[0][60] = towards * 16.1 / (0.125 * towards.square().sum())
    write_again(problem)
    out = paged_attention(problem.queries, problem.block, problem.batch, 0.125)
    assert float(error(out, exact_attention(problem, 0.125, None)).max()) < 1e-5


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("int4", [False, True])
def test_values_of_very_different_sizes(paged_problem: Make, int4: bool, window: int | None) -> None:
    problem = paged_problem(LONG_ROWS, heads=6, kv_heads=2, head_dim=48, page_tokens=24, int4=int4)
    for values in problem.values:
        values.mul_(10 ** (torch.rand(*values.shape[:2], 1) * 8 - 4))
    write_again(problem)
    out = paged_attention(problem.queries, problem.block, problem.batch, 0.3, window)
    assert float(error(out, exact_attention(problem, 0.3, window)).max()) < 2e-5


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("size", [0.0, 1e-32, 1e30])
@pytest.mark.parametrize("int4", [False, True])
def test_queries_of_any_size(paged_problem: Make, int4: bool, size: float) -> None:
    problem = paged_problem(LONG_ROWS, heads=4, kv_heads=1, head_dim=64, page_tokens=24, int4=int4)
    problem.queries.mul_(size)
    out = paged_attention(problem.queries, problem.block, problem.batch, 0.125, 150)
    away = error(out, exact_attention(problem, 0.125, 150))
    if size <= 1.0:
        assert float(away.max()) < 1e-5
    else:  # a single key has all the weight, and another one where two scores are the same but for rounding
        assert int((away > 1e-5).sum()) <= 1


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


@needs_native
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


@needs_native
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


@needs_native
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize("window", [None, 37, 150])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_tokens"), [(8, 2, 64, 24), (5, 1, 32, 31), (3, 3, 80, 7)]
)
def test_spans_do_not_see_the_batch(
    paged_problem: Make,
    one_thread: None,
    int4: bool,
    window: int | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_tokens: int,
) -> None:
    rows = [list(range(100, 160)), [340], [3, 127, 128, 129, 300], list(range(302, 316))]
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_tokens": page_tokens}
    problem = paged_problem(rows, int4=int4, **shape)
    whole = paged_attention(problem.queries, problem.block, problem.batch, 0.2, window)

    def attend(tokens: list[int], of_rows: list[int], starts: list[int]) -> torch.Tensor:
        batch = subset(problem.batch, tokens, of_rows, starts)
        return paged_attention(problem.queries[tokens], problem.block, batch, 0.2, window)

    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(paged_attention(problem.queries, problem.block, problem.batch, 0.2, window), whole)
        alone = {0: (0, 27, 28, 36, 59), 1: (60,), 2: (62, 64, 65), 3: (66, 72, 73, 74, 79)}
        for row, token in ((row, token) for row, tokens in alone.items() for token in tokens):
            assert torch.equal(attend([token], [row], [0, 1])[0], whole[token])
        for start in (1, 26, 27, 28):  # chunks that cross a border
            chunk = list(range(start, start + 9))
            assert torch.equal(attend(chunk, [0], [0, 9]), whole[chunk])
        order = [66, 62, 64, 30, 31, 60]
        assert torch.equal(attend(order, [3, 2, 0, 1], [0, 1, 3, 5, 6]), whole[order])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["key", "value", "query"])
def test_what_is_not_finite_stays_with_those_who_see_it(
    paged_problem: Make, int4: bool, odd: float, where: str
) -> None:
    """Place 110 of row 0, in its KV head 1, or one query: to tokens before it and past its window it is nothing."""
    rows = [[*range(100, 130), *range(155, 165), 200], [110, 131], [300]]
    problem = paged_problem(rows, heads=6, kv_heads=2, head_dim=48, page_tokens=24, int4=int4)
    before = paged_attention(problem.queries, problem.block, problem.batch, 0.2, 50)
    sees = torch.zeros(before.shape[:2], dtype=torch.bool)
    if where == "query":
        problem.queries[7, 4, 5] = odd
        sees[7, 4] = True
    else:
        (problem.keys if where == "key" else problem.values)[0][110, 1] = odd
        write_again(problem)
        positions = problem.batch.positions[:41]
        sees[:41, 3:] = ((positions >= 110) & (positions < 160))[:, None]
    after = paged_attention(problem.queries, problem.block, problem.batch, 0.2, 50)
    assert torch.equal(after[~sees], before[~sees])
    assert not after[sees].isfinite().any()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize(("head_dim", "page_tokens"), [(16, 40), (32, 31), (48, 24), (64, 7)])
def test_what_nobody_wrote_changes_nothing(
    paged_problem: Make, int4: bool, head_dim: int, page_tokens: int
) -> None:
    rows = [[3, 100, 101], [64], [319, 320]]
    problem = paged_problem(rows, head_dim=head_dim, page_tokens=page_tokens, int4=int4)
    before = paged_attention(problem.queries, problem.block, problem.batch, 0.2, 90)
    block = problem.block
    for value in (0, 128, None):
        for tensor in tensors(block):
            places = tensor.view(torch.uint8)
            _ = places.random_(0, 256) if value is None else places.fill_(value)
        write_again(problem)
        assert torch.equal(paged_attention(problem.queries, block, problem.batch, 0.2, 90), before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize(("head_dim", "page_tokens"), [(8, 16), (16, 40), (32, 64), (48, 24)])
def test_pages_may_hold_tokens_before_heads(
    paged_problem: Make, int4: bool, head_dim: int, page_tokens: int
) -> None:
    """A token's keys do not lie behind those of the token before, as they do in the server's pages."""
    problem = paged_problem(LONG_ROWS, head_dim=head_dim, page_tokens=page_tokens, int4=int4)
    turned = KVBlock(*(each.transpose(1, 2).contiguous().transpose(1, 2) for each in tensors(problem.block)))
    out = paged_attention(problem.queries, turned, problem.batch, 0.2, 150)
    assert torch.equal(out, paged_attention(problem.queries, problem.block, problem.batch, 0.2, 150))


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
