"""Linear layers with INT4 weights."""

from exeunt.kernels.int4_linear.dispatch import PackedWeight, int4_linear, pack, pick
from exeunt.kernels.int4_linear.pairs import PairedInt4
from exeunt.kernels.int4_linear.weight import Int4Weight, dequantize, quantize

__all__ = [
    "Int4Weight",
    "PackedWeight",
    "PairedInt4",
    "dequantize",
    "int4_linear",
    "pack",
    "pick",
    "quantize",
]
