"""A linear layer as its launches see it."""

from dataclasses import dataclass

import torch

from exeunt.kernels.tuned.launches import LaunchKey, measured_rows


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A weight [out_features, in_features], gate and up together where gated, and what it is multiplied by."""

    in_features: int
    out_features: int
    int4: bool
    gated: bool = False
    group_size: int = 64  # of INT4 weights
    dtype: torch.dtype = torch.bfloat16  # of the activations

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight, about: what a call of few rows has to read."""
        codes = self.in_features * self.out_features
        if not self.int4:
            return codes * self.dtype.itemsize
        return codes // 2 + 4 * (codes // self.group_size)

    def key(self, rows: int) -> LaunchKey:
        """What a launch of so many rows is kept under."""
        return LaunchKey(
            self.int4,
            self.dtype,
            self.in_features,
            self.out_features,
            self.gated,
            self.group_size if self.int4 else 0,
            measured_rows(rows),
        )
