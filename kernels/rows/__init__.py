"""The norms of rows."""

from exeunt.kernels.rows.dispatch import layer_norm, rms_norm

__all__ = ["layer_norm", "rms_norm"]
