"""Second moments of what a block's linears are given: the Hessians of GPTQ's loss, collected as tokens pass.

A linear's output error on its inputs X is |X (W - Ŵ)ᵀ|², whose second derivative by each output's weights is 2 Xᵀ X
(Frantar et al., arXiv 2210.17323): no token needs to be kept. Products and sums are float32, which a sum over a few
hundred batches does not hurt: what is lost is five orders of magnitude below GPTQ's damping.
"""

import torch
from torch import Tensor

from exeunt.compression.block import Block
from exeunt.compression.linear import FullLinear


class SecondMoments:
    """Xᵀ X summed over tokens, [in, in] float32, on the device where the inputs are."""

    __slots__ = ("sum", "tokens")

    def __init__(self, inputs: int, device: torch.device | str = "cpu") -> None:
        self.sum = torch.zeros(inputs, inputs, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Count the inputs `x` [T, in] of T tokens, any float dtype."""
        x = x.float()
        self.sum.addmm_(x.T, x)
        self.tokens += len(x)


class RecordingLinear(FullLinear):
    """A full-precision linear that counts what it is given. Native kernels refuse it, so that it is really asked."""

    __slots__ = ("moments",)

    def __init__(self, linear: FullLinear, moments: SecondMoments) -> None:
        """`linear`'s own tensors; inputs go to `moments`."""
        super().__init__(linear.weight, linear.bias)
        self.moments = moments

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output; x [..., in] is counted."""
        self.moments.add(x.reshape(-1, self.in_features))
        return super().__call__(x)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Add the output to `residual` in place; x [tokens, in] is counted."""
        self.moments.add(x)
        return super().add_to(residual, x)


def recording(block: Block) -> tuple[Block, dict[str, SecondMoments]]:
    """`block`, all of it in full precision, with linears that record, and their second moments by canonical name."""
    moments: dict[str, SecondMoments] = {}
    linears = {}
    for name, linear in block.linears().items():
        if not isinstance(linear, FullLinear):
            raise TypeError(f"the inputs of {name} are recorded in a full-precision block, this one is INT4")
        moments[name] = SecondMoments(linear.in_features, linear.weight.device)
        linears[name] = RecordingLinear(linear, moments[name])
    return block.with_linears(linears), moments
