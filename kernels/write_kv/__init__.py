"""Writing keys and values into pages, quantised where the pages are INT4."""

from exeunt.kernels.write_kv.dispatch import write_kv
from exeunt.kernels.write_kv.hadamard import hadamard_block, rotate

__all__ = ["hadamard_block", "rotate", "write_kv"]
