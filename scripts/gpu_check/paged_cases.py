"""Kernels that read or write pages, to be timed: attention beside PyTorch's, and writing keys and values."""

from functools import partial

import torch
import torch.nn.functional as F

from exeunt.compression.kv_format import KVPages, kv_layout, page_bytes_for
from exeunt.compression.variant import KVFormat
from exeunt.kernels.paged_attention import paged_attention
from exeunt.kernels.paged_batch import PagedBatch
from exeunt.kernels.timing import Calls, cache_bytes, copies
from exeunt.kernels.write_kv import write_kv
from scripts.gpu_check.kernel_case import Case, random_bf16
from scripts.gpu_check.models import MISTRAL
from scripts.gpu_check.paged_steps import paged_steps


def attention_case(device: torch.device, quick: bool, sequences: int, tokens: int, kv: KVFormat) -> Case:
    """A decode step of one block: every sequence asks with one token. SDPA reads keys and values that lie together."""
    heads, kv_heads, head_dim = (4, 2, 16) if quick else (32, 8, 128)
    full = 2 * sequences * tokens * kv_heads * head_dim * 2
    ours = full if kv == "full" else 2 * sequences * tokens * kv_heads * (head_dim // 2 + 4)

    def make(count: int) -> dict[str, Calls]:
        queries = torch.randn(sequences, heads, head_dim, device=device).to(torch.bfloat16)
        pages, batches = _paged(device, quick, sequences, tokens, kv, count)
        block, scale = pages.block(0), head_dim**-0.5
        found: dict[str, Calls] = {
            "paged_attention": [partial(paged_attention, queries, block, batch, scale) for batch in batches]
        }
        if kv == "full":
            shape = (sequences, kv_heads, tokens, head_dim)
            some = max(1, min(count, copies(full, cache=cache_bytes(device))))
            pairs = [[random_bf16(*shape, device=device) for _ in range(2)] for _ in range(some)]
            q = queries[:, :, None]
            found["sdpa"] = [
                partial(F.scaled_dot_product_attention, q, keys, values, enable_gqa=True)
                for keys, values in pairs
            ]
        return found

    sizes = {"kv": kv, "sequences": sequences, "context": tokens}
    return Case("paged_attention", sizes, {"paged_attention": ours, "sdpa": full}, make)


def _paged(
    device: torch.device, quick: bool, sequences: int, tokens: int, kv: KVFormat, count: int
) -> tuple[KVPages, list[PagedBatch]]:
    """Pages of one block, and `count` decode steps over different ones of them."""
    spec = MISTRAL.spec(blocks=1)
    layout = kv_layout(spec, kv, torch.bfloat16, page_bytes_for(spec, torch.bfloat16))
    if quick:
        layout = type(layout)(kv, (0,), 2, 16, torch.bfloat16, 2048)
    return paged_steps(layout, device, sequences, tokens, count)


def write_case(device: torch.device, quick: bool, tokens: int, kv: KVFormat) -> Case:
    """The keys and values of so many tokens of one block, each to a page of its own sequence."""
    kv_heads, head_dim = (2, 16) if quick else (8, 128)
    read = 2 * tokens * kv_heads * head_dim * 2
    written = read if kv == "full" else 2 * tokens * kv_heads * (head_dim // 2 + 4)

    def make(count: int) -> dict[str, Calls]:
        pages, batches = _paged(device, quick, tokens, 16, kv, min(count, 8))
        keys, values = (
            torch.randn(tokens, kv_heads, head_dim, device=device).to(torch.bfloat16) for _ in range(2)
        )
        return {
            "write_kv": [partial(write_kv, keys, values, batch.slots, pages.block(0)) for batch in batches]
        }

    return Case("write_kv", {"kv": kv, "tokens": tokens}, {"write_kv": read + written}, make)
