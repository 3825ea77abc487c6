"""The Triton attention against plain PyTorch's, and a token alone against itself in company, to the bit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from exeunt.kernels.paged_attention import paged_attention
from exeunt.kernels.paged_attention.reference import paged_attention_reference
from exeunt.kernels.paged_batch import KVBlock, PagedBatch
from exeunt.kernels.write_kv import rotate, write_kv
from tests.kernels.triton.covering import covering
from tests.kernels.triton.on_gpu import on_gpu_only
from tests.kernels.triton.paged_pages import block_on, error, problem_on

pytest.importorskip("triton")
kernels = pytest.importorskip("exeunt.kernels.paged_attention.triton")

Make = Callable[..., Any]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS = [[0, 1, 2, 3, 4], [33], [15, 16, 131, 140], [0], [139]]
SHARED, FOLDED = 1 << 20, 1  # programs share a row's splits, or fold their own

pytestmark = pytest.mark.usefixtures("poisoned")


@contextmanager
def tiles(programs: int, split: int = 128) -> Iterator[None]:
    """Short splits, so that few keys fill several, shared or folded."""
    before = kernels.TILES
    kernels.TILES = replace(before, split=split, programs=programs)
    try:
        yield
    finally:
        kernels.TILES = before


def wide(block: KVBlock) -> KVBlock:
    """The pages in float32, for a reference of 16-bit inputs without 16-bit arithmetic."""
    return block if block.is_int4 else KVBlock(block.keys.float(), block.values.float())


def tolerance(dtype: torch.dtype, device: str) -> float:
    if dtype == BF16:  # the interpreter truncates where a GPU rounds
        return 1e-2 if device == "cuda" else 2e-2
    return 1e-5 if dtype == FP32 else 2e-3


def check_against_reference(
    problem: Any, dtype: torch.dtype, device: str, window: int | None, programs: int
) -> None:
    problem = problem_on(problem, device)
    expected = paged_attention_reference(
        problem.queries.float(), wide(problem.block), problem.batch, 0.2, window
    )
    with tiles(programs):
        out = kernels.paged_attention_triton(problem.queries, problem.block, problem.batch, 0.2, window)
    assert out.dtype == dtype
    assert error(out, expected) < tolerance(dtype, device)


@pytest.mark.parametrize(
    ("kind", "head_dim", "page_tokens", "heads", "window", "programs"),
    covering(
        [(dtype, int4) for dtype in (BF16, FP16, FP32) for int4 in (False, True)],
        [64, 80, 96, 128],
        [16, 60, 37],
        [(1, 1), (4, 1), (7, 1), (4, 2)],
        [None, 70, 130],
        [SHARED, FOLDED],
    ),
)
def test_agrees_with_the_reference(
    paged_problem: Make,
    device: str,
    kind: tuple[torch.dtype, bool],
    head_dim: int,
    page_tokens: int,
    heads: tuple[int, int],
    window: int | None,
    programs: int,
) -> None:
    (dtype, int4), shape = kind, {"heads": heads[0], "kv_heads": heads[1], "head_dim": head_dim}
    problem = paged_problem([[0, 1], [131, 140]], dtype=dtype, int4=int4, page_tokens=page_tokens, **shape)
    check_against_reference(problem, dtype, device, window, programs)


@pytest.mark.parametrize(
    ("dtype", "int4", "heads", "kv_heads", "head_dim", "page_tokens", "window", "programs"),
    [
        (BF16, True, 8, 1, 80, 3, 9, FOLDED),
        (FP16, False, 3, 3, 96, 3, 70, SHARED),
        (FP32, False, 20, 1, 16, 16, 3, FOLDED),
        on_gpu_only(FP32, False, 20, 1, 16, 16, 3, SHARED),
        (FP32, True, 2, 1, 256, 16, None, SHARED),
        (FP16, False, 5, 1, 5, 1, 1, SHARED),
    ],
)
def test_agrees_with_the_reference_in_shapes_of_no_model(
    paged_problem: Make,
    device: str,
    dtype: torch.dtype,
    int4: bool,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_tokens: int,
    window: int | None,
    programs: int,
) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_tokens": page_tokens}
    problem = paged_problem(ROWS, dtype=dtype, int4=int4, **shape)
    check_against_reference(problem, dtype, device, window, programs)


def part_of(
    batch: PagedBatch, tokens: list[int], rows: list[int], counts: list[int], longer: int
) -> PagedBatch:
    """The batch of some tokens of some rows, under wider tables full of nonsense and a larger bound."""
    tables = torch.full(
        (len(rows), batch.page_tables.shape[1] + longer), -7, dtype=torch.int32, device=batch.positions.device
    )
    tables[:, : batch.page_tables.shape[1]] = batch.page_tables[rows]
    starts = torch.tensor([0, *counts], device=batch.positions.device).cumsum(0).int()
    bound = int(batch.positions[tokens].max()) + 1 + 300 * longer
    return PagedBatch(batch.positions[tokens], batch.slots[tokens], starts, tables, bound)


@pytest.mark.parametrize(
    ("dtype", "int4", "head_dim", "page_tokens", "window"),
    [
        (BF16, False, 80, 24, None),
        (BF16, True, 96, 60, 150),
        (FP32, False, 32, 24, 150),
        (FP16, True, 32, 24, None),
        on_gpu_only(BF16, True, 128, 60, None),
        on_gpu_only(FP16, False, 96, 16, 150),
        on_gpu_only(FP32, True, 80, 60, None),
    ],
)
def test_a_token_does_not_see_the_batch(
    paged_problem: Make,
    device: str,
    dtype: torch.dtype,
    int4: bool,
    head_dim: int,
    page_tokens: int,
    window: int | None,
) -> None:
    many = 13 if device == "cuda" else 2  # the interpreter is slow, and adds in one order anyway
    rows = [list(range(110, 134)), [290], [3, 9, 200], [0], *([40 + 9 * i] for i in range(many))]
    heads, kv_heads = (6, 2) if device == "cuda" else (2, 1)
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_tokens": page_tokens}
    problem = problem_on(paged_problem(rows, dtype=dtype, int4=int4, **shape), device)

    def attend(tokens: list[int], of: list[int], counts: list[int], programs: int, longer: int = 0) -> Tensor:
        batch = part_of(problem.batch, tokens, of, counts, longer)
        with tiles(programs):
            out: Tensor = kernels.paged_attention_triton(
                problem.queries[tokens], problem.block, batch, 0.2, window
            )
        return out

    everything = list(range(len(problem.queries)))
    whole = attend(everything, list(range(len(rows))), [len(row) for row in rows], FOLDED)
    assert bool(whole.isfinite().all())
    alone = [(23, 0), (24, 1), (0, 0), (26, 2), (28, 3)]
    for token, row in alone if device == "cuda" else alone[:2]:  # as decode
        for programs, longer in ((SHARED, 0), (FOLDED, 2)):
            assert torch.equal(attend([token], [row], [1], programs, longer)[0], whole[token])
    for chunk in [list(range(5, 22)), [0, 1]][: 2 if device == "cuda" else 1]:  # chunks of a prefill
        assert torch.equal(attend(chunk, [0], [len(chunk)], SHARED, 1), whole[chunk])
    backfill = [2, 7, 23, 27, 25, 27]  # tokens with gaps beside decode, one row several times
    assert torch.equal(attend(backfill, [0, 2, 2, 2], [3, 1, 1, 1], SHARED), whole[backfill])
    order, others = [28, 24, 27, *range(29, 29 + many), 5], [3, 1, 2, *range(4, 4 + many), 0]
    for count in (2, 3, 16, 17) if device == "cuda" else (4 + many,):  # decode, rows in another order
        out = attend(order[:count], others[:count], [1] * count, SHARED)
        assert torch.equal(out, whole[order[:count]])
    if device == "cuda":  # thirty-three rows, some of them twice
        twice, both = [*order, *order[1:]], [*others, *others[1:]]
        assert torch.equal(attend(twice, both, [1] * 33, SHARED), whole[twice])


@pytest.mark.parametrize("window", [None, 65])
@pytest.mark.parametrize("programs", [SHARED, FOLDED])
def test_tokens_on_both_sides_of_a_splits_border(
    paged_problem: Make, device: str, window: int | None, programs: int
) -> None:
    """The last token of a split and the first of the next, and windows that begin there, in blocks of 64 keys."""
    rows = [[63], [64], [191], [127], [128], [129]]
    problem = problem_on(paged_problem(rows, heads=2, kv_heads=1, dtype=FP32), device)
    expected = paged_attention_reference(problem.queries, problem.block, problem.batch, 0.2, window)
    with tiles(programs, split=64):
        out = kernels.paged_attention_triton(problem.queries, problem.block, problem.batch, 0.2, window)
    for row, found, wanted in zip(rows, out, expected, strict=True):
        assert error(found, wanted) < tolerance(FP32, device), row


@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize("programs", [SHARED, FOLDED])
def test_padding_sees_nothing_and_gets_zeros(
    paged_problem: Make, device: str, int4: bool, programs: int
) -> None:
    problem = problem_on(
        paged_problem([[5, 139], [20, 21]], heads=4, kv_heads=2, head_dim=32, int4=int4, dtype=FP32), device
    )
    batch = problem.batch
    gone = torch.tensor([-1] * 5, device=device)
    padded = PagedBatch(
        torch.cat([batch.positions, gone]),
        torch.cat([batch.slots, gone]),
        torch.tensor([0, 2, 4, 5, 6], dtype=torch.int32, device=device),  # the last three stand in no row
        torch.cat([batch.page_tables, torch.full_like(batch.page_tables, -9)]),
        batch.max_context,
    )
    queries = torch.cat([problem.queries, torch.full_like(problem.queries[:1], torch.nan).expand(5, -1, -1)])
    with tiles(programs):
        expected = kernels.paged_attention_triton(problem.queries, problem.block, batch, 0.2)
        out = kernels.paged_attention_triton(queries, problem.block, padded, 0.2)
    assert torch.equal(out[:4], expected)
    assert torch.equal(out[4:], torch.zeros_like(out[4:]))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter computes with NumPy
@pytest.mark.parametrize("int4", [False, True])
def test_what_is_not_finite_reaches_those_who_see_it(paged_problem: Make, device: str, int4: bool) -> None:
    shape = {"heads": 3, "kv_heads": 1, "head_dim": 24}
    source = paged_problem([list(range(126, 134))], int4=int4, **shape)
    clean = problem_on(source, device)
    with tiles(SHARED):
        before = kernels.paged_attention_triton(clean.queries, clean.block, clean.batch, 0.2)
        windowed = kernels.paged_attention_triton(clean.queries, clean.block, clean.batch, 0.2, 4)
    key, value = source.keys[0][129:130], source.values[0][129:130]
    for keys, values in ((torch.full_like(key, torch.inf), value), (key, torch.full_like(value, torch.inf))):
        block = block_on(source.block, "cpu")
        write_kv(keys, values, source.batch.slots[3:4], block)
        block = block_on(block, device)
        for programs in (SHARED, FOLDED) if device == "cuda" else (SHARED if keys is key else FOLDED,):
            with tiles(programs):
                after = kernels.paged_attention_triton(clean.queries, block, clean.batch, 0.2)
                assert torch.equal(after[:3], before[:3])
                assert not bool(after[3:].isfinite().any())
                after = kernels.paged_attention_triton(clean.queries, block, clean.batch, 0.2, 4)
                unseen = [0, 1, 2, 7]  # positions 126 to 128 come before it, 133 sees 130 and later
                assert torch.equal(after[unseen], windowed[unseen])
                assert not bool(after[3:7].isfinite().any())


@pytest.mark.parametrize("int4", [False, True])
def test_an_empty_batch_and_strided_queries(paged_problem: Make, device: str, int4: bool) -> None:
    problem = problem_on(paged_problem([[5], [20, 21]], int4=int4), device)
    for fused in (torch.randn(3, 96, device=device), torch.randn(96, 3, device=device).T):
        strided = fused.as_strided((3, 4, 16), (fused.stride(0), 16 * fused.stride(1), fused.stride(1)))
        out = kernels.paged_attention_triton(strided, problem.block, problem.batch, 0.2)
        dense = kernels.paged_attention_triton(strided.contiguous(), problem.block, problem.batch, 0.2)
        assert bool(out.isfinite().all())
        assert torch.equal(out, dense)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    tables = torch.zeros((0, 4), dtype=torch.int32, device=device)
    starts = torch.zeros(1, dtype=torch.int32, device=device)
    batch = PagedBatch(nothing, nothing, starts, tables, 0)
    queries = torch.randn(0, 4, 16, device=device)
    assert kernels.paged_attention_triton(queries, problem.block, batch, 0.2).shape == (0, 4, 16)


def test_queries_may_come_rotated(paged_problem: Make, device: str) -> None:
    problem = problem_on(paged_problem(ROWS, head_dim=64, int4=True), device)
    plain = kernels.paged_attention_triton(problem.queries, problem.block, problem.batch, 0.2)
    turned = rotate(problem.queries)
    out = kernels.paged_attention_triton(turned, problem.block, problem.batch, 0.2, rotated=True)
    assert error(out, plain) < 1e-6
    public = paged_attention(turned, problem.block, problem.batch, 0.2, rotated=True)
    assert error(public, plain) < 1e-5


def test_scores_far_apart_do_not_overflow(paged_problem: Make, device: str) -> None:
    problem = problem_on(paged_problem([[140], list(range(20))]), device)
    expected = paged_attention_reference(problem.queries, problem.block, problem.batch, 500.0, None)
    with tiles(SHARED):
        out = kernels.paged_attention_triton(problem.queries, problem.block, problem.batch, 500.0)
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("int4", [False, True])
def test_shapes_are_known_without_running(int4: bool) -> None:
    with FakeTensorMode():
        codes = (torch.zeros(9, 2, 16, 32, dtype=torch.uint8), torch.zeros(9, 2, 16, 2, dtype=FP16))
        full = torch.zeros(9, 2, 16, 64, dtype=BF16)
        block = KVBlock(codes[0], codes[0], codes[1], codes[1]) if int4 else KVBlock(full, full)
        tokens = torch.zeros(5, dtype=torch.int64)
        starts = torch.zeros(4, dtype=torch.int32)
        batch = PagedBatch(tokens, tokens, starts, torch.zeros(3, 4, dtype=torch.int32), 50)
        queries = torch.zeros(5, 8, 64, dtype=BF16)
        out = kernels.paged_attention_triton(queries, block, batch, 0.1)
        assert out.shape == (5, 8, 64)
        assert out.dtype == BF16
