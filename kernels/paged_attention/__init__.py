"""Attention over paged keys and values."""

from exeunt.kernels.paged_attention.dispatch import paged_attention

__all__ = ["paged_attention"]
