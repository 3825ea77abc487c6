"""What a sequence takes: bytes of keys and values per token in full and INT4 pages, and how many sequences fit."""

import torch

from exeunt.compression.kv_format import KVLayout, kv_layout, page_bytes_for
from scripts.gpu_check.models import LLAMA, MISTRAL
from scripts.gpu_check.report import Context, Found

_CONTEXT = 4096
_WANTED = 3.5  # times the sequences in the same memory


def run(context: Context, found: Found) -> None:
    """Both models, by their page layouts: padding counts."""
    for shape in (MISTRAL, LLAMA):
        spec = shape.spec()
        size = page_bytes_for(spec, torch.bfloat16)
        full = kv_layout(spec, "full", torch.bfloat16, size)
        int4 = kv_layout(spec, "int4", torch.bfloat16, size)
        ratio = _pages(full) / _pages(int4)
        found[shape.name] = {
            "context": _CONTEXT,
            "page_bytes": size,
            "full_bytes_per_token": full.bytes_per_token,
            "int4_bytes_per_token": int4.bytes_per_token,
            "full_bytes_per_sequence": _pages(full) * size,
            "int4_bytes_per_sequence": _pages(int4) * size,
            "sequences_in_the_same_memory": ratio,
            "wanted": _WANTED,
        }
    context.report.save()


def _pages(layout: KVLayout) -> int:
    """Pages of one sequence."""
    return -(-_CONTEXT // layout.page_tokens)
