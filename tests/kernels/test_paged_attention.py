"""Paged attention against attention written out token by token."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from exeunt.kernels.paged_attention import paged_attention
from exeunt.kernels.paged_attention.reference import paged_attention_reference

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
