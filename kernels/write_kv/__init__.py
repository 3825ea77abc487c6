"""Writing keys and values into pages, quantised where the pages are INT4."""

from exeunt.kernels.write_kv.dispatch import write_kv
from exeunt.kernels.write_kv.hadamard import hadamard_block, rotate
from exeunt.kernels.write_kv.reference import dequantize_heads, quantize_heads
from exeunt.kernels.write_kv.turn import turn_and_write_kv

__all__ = [
    "dequantize_heads",
    "hadamard_block",
    "quantize_heads",
    "rotate",
    "turn_and_write_kv",
    "write_kv",
]
