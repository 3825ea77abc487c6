"""Linear layers with full-precision weights."""

from exeunt.kernels.full_linear.dispatch import full_linear

__all__ = ["full_linear"]
