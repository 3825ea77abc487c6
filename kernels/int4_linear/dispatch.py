"""The public INT4 linear: picks the version by how the weight was packed."""

from torch import Tensor

from exeunt.kernels.int4_linear.reference import int4_linear_reference
from exeunt.kernels.int4_linear.weight import Int4Weight

PackedWeight = Int4Weight


def pack(weight: Int4Weight) -> PackedWeight:
    """Return the weight in the layout of the fastest version on its device; the canonical tensors may then
    go."""
    return weight


def int4_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Return x [..., in] times the INT4 weight transposed, plus bias [out]: [..., out] in x's dtype."""
    return int4_linear_reference(x, weight, bias)
