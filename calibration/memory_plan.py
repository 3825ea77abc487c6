"""What calibration's passes take in memory: whether full-precision blocks may all stay there, and how wide a batch is.

Both follow from a model's shape alone but for the machine's free memory, which decides whether blocks are streamed; and
streaming changes no bit of what comes out on a CPU (`exeunt.compression.streamed_blocks`).
"""

from typing import Final

import torch

from exeunt.compression.architecture import Architecture
from exeunt.compression.memory import free_bytes

RESIDENT_SHARE: Final = 1 / 3
"""Of the free memory that full-precision blocks may take. The INT4 ones beside them take another 0.31 of their size
in 16 bits, so that more than half stays free for batches, second moments, logits and the file cache."""
BATCH_BLOCKS: Final = 2.0
"""Full-precision blocks whose size the keys, values and states of a batch through full weights may have. What is read
for a batch once is spread over more tokens; more would make the batch, not the model, what fills the memory."""


def block_bytes(spec: Architecture, dtype: torch.dtype) -> int:
    """Bytes of one block in full precision."""
    return spec.block_parameters * dtype.itemsize


def streams(spec: Architecture, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether full-precision blocks had better be read one at a time: all of them would crowd `device` now."""
    return spec.blocks * block_bytes(spec, dtype) > RESIDENT_SHARE * free_bytes(device)


def batch_token_bytes(spec: Architecture, dtype: torch.dtype) -> int:
    """Bytes that a token of a batch takes: its full keys and values in all blocks, and the widest block's states."""
    keys_and_values = spec.blocks * 2 * spec.kv_size
    fan_in = (2 if spec.gated else 1) * spec.intermediate_size
    widest = max(spec.query_size + 2 * spec.kv_size, fan_in)
    states = 3 * spec.hidden_size + widest + max(spec.query_size, spec.intermediate_size)
    return (keys_and_values + states) * dtype.itemsize


def full_batch_tokens(spec: Architecture, dtype: torch.dtype, least: int) -> int:
    """Tokens of a batch through full weights, at least `least`: as many as take the memory of `BATCH_BLOCKS` blocks."""
    room = BATCH_BLOCKS * block_bytes(spec, dtype)
    return max(least, int(room / batch_token_bytes(spec, dtype)))
