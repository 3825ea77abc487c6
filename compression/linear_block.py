"""The linear block: one transformer block replaced by an affine map of low rank."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from exeunt.kernels.full_linear import full_linear

_PREFIX = "linear_block."


class LinearBlockError(ValueError):
    """Tensors that do not form a linear block."""


@dataclass(frozen=True, slots=True)
class LinearBlock:
    """Block `index` as h + U (V h) + b, fitted by ridge regression on the block's residual.

    It has no attention and so no keys and values. R is the rank, H the hidden size.
    """

    index: int
    down: Tensor  # V, [R, H]
    up: Tensor  # U, [H, R]
    bias: Tensor  # b, [H]

    def __post_init__(self) -> None:
        rank, hidden = self.down.shape[0], self.down.shape[-1]
        shapes = (tuple(self.down.shape), tuple(self.up.shape), tuple(self.bias.shape))
        if shapes != ((rank, hidden), (hidden, rank), (hidden,)):
            raise LinearBlockError(
                f"linear block {self.index}: down {shapes[0]}, up {shapes[1]} and bias {shapes[2]} must be "
                "[R, H], [H, R] and [H]"
            )

    def apply(self, hidden: Tensor) -> Tensor:
        """The block's output for `hidden` [..., H], same shape and dtype."""
        return hidden + full_linear(full_linear(hidden, self.down), self.up, self.bias)

    @property
    def rank(self) -> int:
        """R, the width between the two matrices."""
        return int(self.down.shape[0])

    @property
    def hidden_size(self) -> int:
        """H, the width of the states."""
        return int(self.down.shape[1])

    @property
    def parameters(self) -> int:
        """Numbers held by both matrices and the bias."""
        return self.down.numel() + self.up.numel() + self.bias.numel()

    @property
    def nbytes(self) -> int:
        """Resident size in bytes."""
        return self.down.nbytes + self.up.nbytes + self.bias.nbytes

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "LinearBlock":
        """The same map on `device` in `dtype`."""
        return LinearBlock(
            self.index,
            self.down.to(device, dtype),
            self.up.to(device, dtype),
            self.bias.to(device, dtype),
        )


def linear_block_tensors(block: LinearBlock) -> dict[str, Tensor]:
    """The tensors of `block` under the names they have in a bundle: `linear_block.<index>.<part>`."""
    name = f"{_PREFIX}{block.index}."
    return {name + "down": block.down, name + "up": block.up, name + "bias": block.bias}


def linear_block_from_tensors(tensors: Mapping[str, Tensor]) -> LinearBlock:
    """The block that `linear_block_tensors` named; raises LinearBlockError for any other tensors."""
    indices = {name.removeprefix(_PREFIX).split(".")[0] for name in tensors if name.startswith(_PREFIX)}
    if len(indices) != 1 or not (index := indices.pop()).isdecimal():
        raise LinearBlockError(f"expected the tensors of one linear block, found {sorted(tensors) or 'none'}")
    name = f"{_PREFIX}{index}."
    expected = {name + part for part in ("down", "up", "bias")}
    if set(tensors) != expected:
        raise LinearBlockError(f"expected the tensors {sorted(expected)}, found {sorted(tensors)}")
    return LinearBlock(int(index), tensors[name + "down"], tensors[name + "up"], tensors[name + "bias"])
