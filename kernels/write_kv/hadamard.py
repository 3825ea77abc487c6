"""The Hadamard rotation of queries and keys: leaves their scores unchanged, spreads outlier channels.

A rotation R is orthonormal, so (R q)·(R k) = q·k; rotated keys have no dominant channels and lose less when
they are quantised (QuaRot, arXiv 2404.00456, does the same with a head-wise Hadamard transform after RoPE).
"""

import math

import torch
from torch import Tensor


def hadamard_block(head_dim: int) -> int:
    """Return the size of one block of the rotation: the largest power of two that divides `head_dim`."""
    if head_dim < 1:
        raise ValueError(f"head_dim is {head_dim}, it must be at least 1")
    return head_dim & -head_dim


def rotate(x: Tensor) -> Tensor:
    """Return x [..., head_dim] times the orthonormal block-diagonal Hadamard matrix (its own inverse).

    Computed and returned in float32 by butterflies of strides 1, 2, 4, …; the native version does the same
    additions in the same order, so that both give the same bits.
    """
    head_dim = x.shape[-1]
    block = hadamard_block(head_dim)
    rotated = x.float()
    stride = 1
    while stride < block:
        pairs = rotated.reshape(*x.shape[:-1], head_dim // (2 * stride), 2, stride)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        rotated = torch.stack((low + high, low - high), dim=-2)
        stride *= 2
    return rotated.reshape(x.shape) * (1.0 / math.sqrt(block))
