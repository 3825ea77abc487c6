"""Paged problems of `tests/kernels/conftest.py` on the device that the Triton kernels run on, strides kept."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from exeunt.kernels.paged_batch import KVBlock, PagedBatch


def moved(tensor: Tensor, device: str) -> Tensor:
    """A copy of a strided view with all of the memory around it: the same strides, at the same place."""
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    copied = whole.to(device) if device != "cpu" else whole.clone()
    return copied.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def block_on(block: KVBlock, device: str) -> KVBlock:
    """A copy of a block's pages."""
    tensors = (block.keys, block.values, block.key_params, block.value_params)
    return KVBlock(*[None if tensor is None else moved(tensor, device) for tensor in tensors])  # type: ignore[arg-type]


def batch_on(batch: PagedBatch, device: str) -> PagedBatch:
    """A copy of a batch."""
    return PagedBatch(
        batch.positions.to(device),
        batch.slots.to(device),
        batch.query_starts.to(device),
        batch.page_tables.to(device),
        batch.max_context,
    )


def problem_on(problem: Any, device: str) -> Any:
    """A copy of a problem; `keys` and `values` stay where they are."""
    return replace(
        problem,
        queries=problem.queries.to(device),
        block=block_on(problem.block, device),
        batch=batch_on(problem.batch, device),
    )


def bits_of(block: KVBlock) -> list[Tensor]:
    """All bytes of a block's pages, on the CPU."""
    tensors = (block.keys, block.values, block.key_params, block.value_params)
    return [tensor.cpu().contiguous().view(torch.uint8) for tensor in tensors if tensor is not None]


def error(out: Tensor, expected: Tensor) -> float:
    """‖out - expected‖ / ‖expected‖, infinite where anything is not finite."""
    out, expected = out.cpu().double(), expected.cpu().double()
    if not bool(out.isfinite().all()):
        return float("inf")
    return float((out - expected).norm() / expected.norm())
