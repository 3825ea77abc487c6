"""The INT4 linear layer on the CPU: native code over weights repacked for it.

Activations are quantised to INT8 on the way in, per row and weight group (scale = largest magnitude / 127), so that
an outlier costs precision only inside its own group. For normally distributed activations and groups of 32 the
result is within 0.65 % (relative root mean square) of the float32 product with the dequantised weight, 0.75 % for
groups of 128. Sums of integers are exact and groups are added in order: a row's result is the same to the bit
whatever rows are computed with it, and on every machine whose vectors are fused multiply-add.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.kernels.int4_linear.weight import Int4Weight, unpack_nibbles
from exeunt.kernels.native.library import DTYPE_CODES, NativeLibrary

_STEP = 8  # inputs of one vector of packed bytes, see kernels/native/int4_linear.h
_PACK_ELEMENTS = 1 << 23  # codes unpacked at once while repacking


@dataclass(frozen=True, slots=True)
class PackedInt4:
    """An INT4 weight in the native layout: `panels` [outputs / lanes, bytes], see kernels/native/int4_linear.h."""

    panels: Tensor
    group_size: int
    in_features: int
    out_features: int
    library: NativeLibrary

    @property
    def nbytes(self) -> int:
        """Bytes that the weight holds."""
        return self.panels.nbytes


def pack_panels(weight: Int4Weight, library: NativeLibrary) -> PackedInt4:
    """Return the weight repacked for `library`; a slice of it at a time is unpacked."""
    lanes = library.lanes
    panels = -(-weight.out_features // lanes)
    together = max(1, _PACK_ELEMENTS // (weight.in_features * lanes))
    parts = [
        _pack_slice(weight, start * lanes, min((start + together) * lanes, weight.out_features), lanes)
        for start in range(0, panels, together)
    ]
    packed = torch.cat(parts) if len(parts) != 1 else parts[0]
    return PackedInt4(packed, weight.group_size, weight.in_features, weight.out_features, library)


def _pack_slice(weight: Int4Weight, start: int, stop: int, lanes: int) -> Tensor:
    """Outputs `start` to `stop` - 1 as [panels, bytes]: the whole groups, then the shorter last one."""
    missing = -(stop - start) % lanes
    codes = F.pad(unpack_nibbles(weight.codes[start:stop]), (0, 0, 0, missing))
    scales = F.pad(weight.scales[start:stop], (0, 0, 0, missing))
    offsets = F.pad(weight.offsets[start:stop], (0, 0, 0, missing))
    whole = weight.in_features // weight.group_size
    inner = whole * weight.group_size
    parts = []
    if whole:
        groups = codes[:, :inner].reshape(-1, whole, weight.group_size)
        parts.append(_pack_groups(groups, scales[:, :whole], offsets[:, :whole], lanes))
    if inner < weight.in_features:
        parts.append(_pack_groups(codes[:, None, inner:], scales[:, whole:], offsets[:, whole:], lanes))
    return torch.cat(parts, dim=1).contiguous()


def _pack_groups(codes: Tensor, scales: Tensor, offsets: Tensor, lanes: int) -> Tensor:
    """Codes [outputs, groups, size], scales and offsets [outputs, groups] as [panels, bytes]."""
    outputs, groups, size = codes.shape
    codes = F.pad(codes, (0, -size % _STEP))
    codes = codes.reshape(
        outputs // lanes, lanes, groups, -1, 2, _STEP // 2
    )  # [panel, lane, group, step, half, 4]
    codes = codes.permute(0, 2, 3, 4, 1, 5)  # [panel, group, step, half, lane, 4]
    packed = (codes[:, :, :, 0] | (codes[:, :, :, 1] << 4)).flatten(2)
    tables = [
        table.reshape(-1, lanes, groups).transpose(1, 2).contiguous().view(torch.uint8)
        for table in (scales, offsets)
    ]
    return torch.cat([*tables, packed], dim=2).flatten(1)


def pick_outputs(weight: PackedInt4, outputs: Tensor) -> PackedInt4:
    """Return the weight of some outputs alone, [n] int64 in the order wanted, with the very codes of the whole one."""
    lanes = weight.library.lanes
    wanted = F.pad(
        outputs, (0, -len(outputs) % lanes)
    )  # the rest of the last panel is output 0, which nobody reads
    panel, lane = wanted // lanes, wanted % lanes
    parts, at = [], 0
    for start in range(0, weight.in_features, weight.group_size):
        steps = -(-min(weight.group_size, weight.in_features - start) // _STEP)
        for count, width in (
            (1, 2),
            (1, 2),
            (steps, 4),
        ):  # scales, offsets, packed codes: bytes of one output
            stop = at + count * lanes * width
            whole = weight.panels[:, at:stop].view(-1, count, lanes, width)
            own = whole[panel, :, lane]  # [padded outputs, count, width]
            parts.append(own.view(-1, lanes, count, width).transpose(1, 2).flatten(1))
            at = stop
    panels = torch.cat(parts, dim=1).contiguous()
    return PackedInt4(panels, weight.group_size, weight.in_features, len(outputs), weight.library)


def int4_linear_native(x: Tensor, weight: PackedInt4, bias: Tensor | None) -> Tensor:
    """Return x [..., in] times the weight transposed, plus bias [out], in x's dtype (a float type of the CPU's)."""
    *leading, features = x.shape
    dtype = x.dtype
    if features != weight.in_features:
        raise ValueError(f"the input has {features} features, the INT4 weight takes {weight.in_features}")
    if not x.is_cpu or dtype not in DTYPE_CODES:
        raise TypeError(
            f"weights packed for the CPU take float32, bfloat16 or float16 there, not {x.dtype} {x.device}"
        )
    if bias is not None and bias.shape != (weight.out_features,):
        raise ValueError(
            f"the bias is {list(bias.shape)}, the INT4 weight gives {weight.out_features} features"
        )
    x = x.contiguous()
    if bias is not None and (bias.dtype != dtype or not bias.is_contiguous()):
        bias = bias.to(dtype).contiguous()
    out = torch.empty((*leading, weight.out_features), dtype=dtype)
    weight.library.int4_linear(
        out.data_ptr(),
        x.data_ptr(),
        weight.panels.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.numel() // features,
        features,
        weight.out_features,
        weight.group_size,
        DTYPE_CODES[dtype],
        torch.get_num_threads(),
    )
    return out
