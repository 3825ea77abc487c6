"""Linear layers with INT4 weights."""

from exeunt.kernels.int4_linear.dispatch import PackedWeight, int4_linear, pack, pick
from exeunt.kernels.int4_linear.weight import Int4Weight, dequantize, quantize

__all__ = ["Int4Weight", "PackedWeight", "dequantize", "int4_linear", "pack", "pick", "quantize"]
