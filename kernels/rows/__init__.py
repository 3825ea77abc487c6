"""The small operations between a block's linears, one call each: RMS norm, rotary embedding, gated SiLU."""

from exeunt.kernels.rows.dispatch import rms_norm, rotate_heads, silu_mul

__all__ = ["rms_norm", "rotate_heads", "silu_mul"]
