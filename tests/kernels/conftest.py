"""Paged problems at random: rows with gaps, over pages that hold NaN wherever nothing was written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from exeunt.kernels.paged_batch import KVBlock, PagedBatch
from exeunt.kernels.write_kv import write_kv


@dataclass(frozen=True, slots=True)
class PagedProblem:
    """A batch whose `keys` and `values` (by row) were written to `block`."""

    queries: Tensor  # [tokens, heads, head_dim]
    block: KVBlock
    batch: PagedBatch
    keys: list[Tensor]  # per row [context, kv_heads, head_dim]
    values: list[Tensor]


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed for every run, printed so that a failure can be repeated."""
    value = int(torch.seed() % (1 << 31))
    print(f"{request.node.name}: seed {value}")
    torch.manual_seed(value)
    return value


def empty_block(
    pages: int, kv_heads: int, page_tokens: int, head_dim: int, dtype: torch.dtype, int4: bool
) -> KVBlock:
    """A strided block inside a larger arena, as the server's pages are, every byte 0xFF: NaN."""
    spare = 3  # other blocks share each page: views are strided

    def strided(width: int, kind: torch.dtype) -> Tensor:
        values = pages * spare * kv_heads * page_tokens * width
        arena = torch.full((values * torch.empty(0, dtype=kind).element_size(),), 255, dtype=torch.uint8)
        return arena.view(kind).reshape(pages, spare, kv_heads, page_tokens, width)[:, 1]

    if not int4:
        return KVBlock(strided(head_dim, dtype), strided(head_dim, dtype))
    codes, half = torch.uint8, torch.float16
    return KVBlock(
        strided(head_dim // 2, codes), strided(head_dim // 2, codes), strided(2, half), strided(2, half)
    )


def make_problem(
    row_positions: Sequence[Sequence[int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    page_tokens: int = 16,
    dtype: torch.dtype = torch.float32,
    int4: bool = False,
) -> PagedProblem:
    """Rows of query tokens at the given positions, each over a context up to its largest one."""
    contexts = [max(positions) + 1 for positions in row_positions]
    needs = [-(-context // page_tokens) for context in contexts]
    pages = sum(needs) + 2
    order = torch.randperm(pages).tolist()
    block = empty_block(pages, kv_heads, page_tokens, head_dim, dtype, int4)
    tables = torch.full((len(contexts), max(needs, default=0) + 1), 1 << 30, dtype=torch.int32)
    keys, values, slots = [], [], []
    for row, (context, need) in enumerate(zip(contexts, needs, strict=True)):
        tables[row, :need] = torch.tensor([order.pop() for _ in range(need)], dtype=torch.int32)
        places = torch.arange(context)
        row_slots = tables[row].long()[places // page_tokens] * page_tokens + places % page_tokens
        keys.append(torch.randn(context, kv_heads, head_dim).to(dtype))
        values.append(torch.randn(context, kv_heads, head_dim).to(dtype))
        write_kv(keys[-1], values[-1], row_slots, block)
        slots.append(row_slots[torch.tensor(row_positions[row])])
    counts = torch.tensor([0, *(len(positions) for positions in row_positions)])
    positions = torch.tensor([place for places in row_positions for place in places], dtype=torch.int64)
    batch = PagedBatch(
        positions,
        torch.cat(slots) if slots else torch.empty(0, dtype=torch.int64),
        counts.cumsum(0).int(),
        tables,
        max(contexts, default=0),
    )
    return PagedProblem(torch.randn(len(positions), heads, head_dim).to(dtype), block, batch, keys, values)


@pytest.fixture
def paged_problem(seed: int) -> Callable[..., PagedProblem]:
    return make_problem


@pytest.fixture
def new_block() -> Callable[..., KVBlock]:
    return empty_block
