"""The norm of rows."""

from exeunt.kernels.rows.dispatch import rms_norm

__all__ = ["rms_norm"]
