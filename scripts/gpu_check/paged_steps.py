"""Pages of one block and decode steps over them: what kernels that read or write pages are timed with."""

import torch

from exeunt.compression.kv_format import KVLayout, KVPages
from exeunt.kernels.paged_batch import PagedBatch


def paged_steps(
    layout: KVLayout, device: torch.device, sequences: int, tokens: int, count: int
) -> tuple[KVPages, list[PagedBatch]]:
    """Pages, and `count` steps over different ones of them: each sequence asks with the last of its `tokens`."""
    size = layout.page_tokens
    each = -(-tokens // size)
    arena = torch.empty(
        count * sequences * each * layout.page_bytes // 2, dtype=torch.bfloat16, device=device
    )
    pages = KVPages(layout, arena.normal_().view(torch.uint8))
    tables = torch.randperm(pages.num_pages, device=device).view(count, sequences, each).to(torch.int32)
    at = torch.full((sequences,), tokens - 1, dtype=torch.int64, device=device)
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=device)
    batches = [
        PagedBatch(at, table[:, -1].long() * size + (tokens - 1) % size, starts, table.contiguous(), tokens)
        for table in tables
    ]
    return pages, batches
