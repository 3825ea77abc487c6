"""Rotary position embedding: which frequencies a config asks for, and the tables of their cosines and sines."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """The rotation's frequencies, already worked out from the config (radians per position, float32 values).

    `kind` is one of SUPPORTED_ROPE_TYPES and is kept for people to read; the arithmetic needs the other two only.
    `attention_scaling` multiplies cosines and sines (yarn, arXiv 2309.00071 section 3.4; 1 for the others).
    """

    kind: str
    inverse_frequencies: tuple[float, ...]  # [head_dim / 2]
    attention_scaling: float = 1.0


def rope_spec(kind: str, head_dim: int, config: Any) -> RopeSpec:
    """The spec of a transformers config whose `rope_parameters` are flat and hold `rope_type` and `rope_theta`.

    The scaled types are worked out by transformers' own ROPE_INIT_FUNCTIONS, so that they cannot drift from it.
    """
    if kind == "default":
        # RoFormer (arXiv 2104.09864, section 3.2.2): theta ** (-2i / d), in float32 as transformers does.
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
        return RopeSpec(kind, tuple((1.0 / config.rope_parameters["rope_theta"] ** exponents).tolist()))
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return RopeSpec(kind, tuple(frequencies.to(torch.float32).tolist()), float(scaling))


class RopeTables:
    """Cosines and sines by position, in the model's dtype, grown by doubling as longer contexts appear.

    Growing keeps a model that was trained for 128k positions from holding tables for all of them when it serves 4k
    (128k positions at head size 128 are 128 MiB in float32). `reserve` fixes the size up front, and with it the
    address, which a captured CUDA graph needs.
    """

    def __init__(self, spec: RopeSpec, device: torch.device, dtype: torch.dtype, initial: int = 1024) -> None:
        self.spec = spec
        self.device = device
        self.dtype = dtype
        self._table = self._build(initial)

    def reserve(self, positions: int) -> None:
        """Make the tables hold at least `positions` positions."""
        if positions > self._table.shape[0]:
            self._table = self._build(max(positions, 2 * int(self._table.shape[0])))

    def at(self, positions: Tensor, max_context: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [tokens, 1, head_dim] of int64 `positions` [tokens], all below `max_context`."""
        self.reserve(max_context)
        rows = self._table.index_select(0, positions)
        return rows[:, 0:1], rows[:, 1:2]

    def table(self, positions: int) -> Tensor:
        """Cosines and signed sines of at least `positions` positions, [positions, 2, head_dim]."""
        self.reserve(positions)
        return self._table

    @property
    def nbytes(self) -> int:
        """Bytes of the tables as they stand."""
        return self._table.nbytes

    def _build(self, positions: int) -> Tensor:
        """[positions, 2, head_dim]: cosines, then sines whose first half is negated (see `rotate`)."""
        with torch.inference_mode(False):
            frequencies = torch.tensor(self.spec.inverse_frequencies, dtype=torch.float32)
            angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
            cosines = angles.cos() * self.spec.attention_scaling
            sines = angles.sin() * self.spec.attention_scaling
            table = torch.stack([torch.cat([cosines, cosines], -1), torch.cat([-sines, sines], -1)], dim=1)
            return table.to(device=self.device, dtype=self.dtype)


def rotate(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """`states` [..., head_dim] turned by their positions; `cosines` and `sines` as `RopeTables.at` gives them.

    x·cos + rotate_half(x)·sin as in transformers, with rotate_half's sign moved into the sine table: rolling by half
    the head then does the rest. Every product and the sum round to the states' dtype, as there.
    """
    return (states * cosines).add_(states.roll(states.shape[-1] // 2, -1).mul_(sines))
