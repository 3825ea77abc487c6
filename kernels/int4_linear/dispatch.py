"""The public INT4 linear: picks the version by how the weight was packed."""

from dataclasses import replace

from torch import Tensor

from exeunt.kernels.gpu import check_one_device, triton_runs
from exeunt.kernels.int4_linear.native import PackedInt4, int4_linear_native, pack_panels, pick_outputs
from exeunt.kernels.int4_linear.pairs import PairedInt4, pack_pairs
from exeunt.kernels.int4_linear.reference import int4_linear_reference
from exeunt.kernels.int4_linear.weight import Int4Weight
from exeunt.kernels.native.library import native_library

PackedWeight = Int4Weight | PackedInt4 | PairedInt4


def pack(weight: Int4Weight) -> PackedWeight:
    """Return the weight in the layout of the fastest version on its device.

    Nothing of the canonical tensors is kept, the caller may drop them; where there is no faster version the weight
    itself comes back.
    """
    if triton_runs(weight.codes.device):
        return pack_pairs(weight)
    library = native_library() if weight.codes.is_cpu else None
    return weight if library is None else pack_panels(weight, library)


def pick(weight: PackedWeight, outputs: Tensor) -> PackedWeight:
    """Return a weight of some outputs alone, [n] int64 in the order wanted: copies of the whole weight's own codes."""
    if isinstance(weight, PackedInt4):
        return pick_outputs(weight, outputs)
    if isinstance(weight, PairedInt4):
        return weight.pick(outputs)
    codes, scales, offsets = (part[outputs] for part in (weight.codes, weight.scales, weight.offsets))
    return replace(weight, codes=codes, scales=scales, offsets=offsets, out_features=len(outputs))


def int4_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Return x [..., in] times the INT4 weight transposed, plus bias [out]: [..., out] in x's dtype.

    A weight packed for a CPU runs natively, with activations rounded to INT8 (see `exeunt.kernels.int4_linear.native`
    for the error), one packed for a GPU in Triton, a canonical one in plain PyTorch. Raises ValueError where the sizes
    do not fit.
    """
    if isinstance(weight, PackedInt4):
        return int4_linear_native(x, weight, bias)
    if isinstance(weight, PairedInt4):
        check_one_device(
            "the input, the weight and the bias", x, weight.codes, *(() if bias is None else (bias,))
        )
        # Triton is there only where a GPU is
        from exeunt.kernels.int4_linear.triton import int4_linear_triton

        return int4_linear_triton(x, weight, bias).view(*x.shape[:-1], weight.out_features)
    return int4_linear_reference(x, weight, bias)
