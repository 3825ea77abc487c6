"""Findings and shapes of a GPU that nobody has."""

import torch

from exeunt.kernels.linear_tiles import Tile
from exeunt.kernels.tuned.files import Finding
from exeunt.kernels.tuned.launches import TunedLaunch
from exeunt.kernels.tuned.shape import LinearShape

GPU = "NVIDIA Q100 80GB"
INT4 = LinearShape(4096, 28672, int4=True, gated=True)
FULL = LinearShape(2048, 2560, int4=False)
HALF = LinearShape(2048, 2560, int4=False, dtype=torch.float16)
NARROW = TunedLaunch(Tile(8, 32, 4, 1), split=True)
WIDE = TunedLaunch(Tile(128, 64, 3, 4), split=False)


def findings() -> list[Finding]:
    """A launch of INT4 weights, one of full ones, and a call for which the rule is best."""
    return [
        Finding(INT4.key(1), NARROW, 2e-5, 3e-5),
        Finding(FULL.key(512), WIDE, 4e-5, 5e-5),
        Finding(FULL.key(1), None, 6e-6, 6e-6),
    ]
