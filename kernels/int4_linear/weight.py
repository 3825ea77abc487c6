"""A linear layer's weight in INT4: uniform groups along the input dimension, two codes a byte."""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_CODE = 15
FP16_MAX = 65504.0
# Shrinking a group's range clips its tails and makes the step finer; the search keeps the best of these.
CLIP_RATIOS = (0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79, 0.76, 0.73)
_ROWS_ELEMENTS = 1 << 22  # weights quantised at once: bounds the scratch of the search to a few times 16 MB


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """The canonical packed weight: w[o, i] = code[o, i] × scales[o, i // g] + offsets[o, i // g].

    g is `group_size`; `codes` is [out, in / 2] uint8 with element 2i in the low nibble of byte i and 2i + 1
    in the high one; `scales` and `offsets` are [out, groups] float16. The last group of a row may be shorter.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor
    group_size: int
    in_features: int
    out_features: int

    def __post_init__(self) -> None:
        check_geometry(self.in_features, self.group_size)
        groups = -(-self.in_features // self.group_size)
        _check("codes", self.codes, (self.out_features, self.in_features // 2), torch.uint8)
        _check("scales", self.scales, (self.out_features, groups), torch.float16)
        _check("offsets", self.offsets, (self.out_features, groups), torch.float16)

    @property
    def groups(self) -> int:
        """Groups of a row, the last perhaps shorter."""
        return int(self.scales.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes that the weight holds."""
        return self.codes.nbytes + self.scales.nbytes + self.offsets.nbytes


def check_geometry(in_features: int, group_size: int) -> None:
    """Raise ValueError where a weight of this input size cannot be held in groups of this size."""
    if in_features < 2 or in_features % 2:
        raise ValueError(f"INT4 holds two codes a byte: in_features is {in_features}, it must be even")
    if group_size < 2 or group_size % 2:
        raise ValueError(f"group_size is {group_size}, it must be even and at least 2")


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(
            f"INT4 {name} are {list(tensor.shape)} {tensor.dtype}, expected {list(shape)} {dtype}"
        )


def quantize(weight: Tensor, group_size: int, importance: Tensor | None = None) -> Int4Weight:
    """Return `weight` [out, in] rounded to nearest INT4 in groups of `group_size` along the input dimension.

    Each group's range is its minimum to its maximum, shrunk by the ratio of `CLIP_RATIOS` with the least
    squared error, each input's counted `importance` [in] times where that is given. Codes are rounded with the
    float16 scale and offset that are stored, so that dequantising repeats exactly what the search measured. Raises
    ValueError for an odd input size and for weights that are not finite float16s.
    """
    out_features, in_features = weight.shape
    check_geometry(in_features, group_size)
    groups = -(-in_features // group_size)
    device = weight.device
    codes = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(out_features, groups, dtype=torch.float16, device=device)
    offsets = torch.empty_like(scales)
    rows = max(1, _ROWS_ELEMENTS // in_features)
    for start in range(0, out_features, rows):
        part = slice(start, start + rows)
        codes[part], scales[part], offsets[part] = _quantize_rows(
            weight[part].float(), group_size, importance
        )
    return Int4Weight(codes, scales, offsets, group_size, in_features, out_features)


def check_range(weight: Tensor) -> None:
    """Raise ValueError where a weight is not a finite float16."""
    if not bool((weight.abs() <= FP16_MAX).all()):
        raise ValueError(f"a weight is not finite or exceeds {FP16_MAX:g}, INT4 offsets are float16")


def _quantize_rows(
    weight: Tensor, group_size: int, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, in_features = weight.shape
    check_range(weight)
    whole = in_features // group_size * group_size
    parts = []
    if whole:
        inner = None if importance is None else importance[:whole].reshape(-1, group_size)
        parts.append(fit_groups(weight[:, :whole].reshape(rows, -1, group_size), inner))
    if whole < in_features:
        parts.append(fit_groups(weight[:, None, whole:], None if importance is None else importance[whole:]))
    codes = torch.cat([part[0].reshape(rows, -1) for part in parts], dim=1)
    return (
        pack_nibbles(codes.to(torch.uint8)),
        torch.cat([part[1] for part in parts], 1),
        torch.cat([part[2] for part in parts], 1),
    )


def fit_groups(weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [rows, groups, size] (float), scales and offsets [rows, groups] float16 of `weight` [rows, groups, size].

    The range of each group is searched as `quantize` says; `importance` ([size] or [groups, size]) weighs its inputs.
    """
    low, high = weight.amin(-1), weight.amax(-1)
    codes, scale, offset = round_groups(weight, low, high)
    least = _squared_error(weight, codes, scale, offset, importance)
    for ratio in CLIP_RATIOS:
        tried, tried_scale, tried_offset = round_groups(weight, low * ratio, high * ratio)
        error = _squared_error(weight, tried, tried_scale, tried_offset, importance)
        better = error < least
        least = torch.where(better, error, least)
        codes = torch.where(better.unsqueeze(-1), tried, codes)
        scale = torch.where(better, tried_scale, scale)
        offset = torch.where(better, tried_offset, offset)
    return codes, scale, offset


def _squared_error(
    weight: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, importance: Tensor | None
) -> Tensor:
    restored = codes * scale.float().unsqueeze(-1) + offset.float().unsqueeze(-1)
    squares = restored.sub_(weight).square_()
    return (squares if importance is None else squares.mul_(importance)).sum(-1)


def round_groups(weight: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (codes [..., size] float, scale [...] float16, offset [...] float16) for the range `low` to
    `high`."""
    scale = ((high - low) / MAX_CODE).clamp_(max=FP16_MAX).half()
    offset = low.half()
    step = scale.float().unsqueeze(-1)
    inverse = torch.where(
        step > 0, 1.0 / step, torch.zeros_like(step)
    )  # a constant group has no step: code 0
    codes = ((weight - offset.float().unsqueeze(-1)) * inverse).round_().clamp_(0, MAX_CODE)
    return codes, scale, offset


def dequantize(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] in `dtype` (computed in float32)."""
    return dequantize_rows(weight, 0, weight.out_features, dtype)


def dequantize_rows(weight: Int4Weight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Return rows `start` to `stop` - 1 of the weight, [stop - start, in], in `dtype`."""
    codes = unpack_nibbles(weight.codes[start:stop]).float()
    scales, offsets = (
        table[start:stop].float().repeat_interleave(weight.group_size, dim=1)[:, : weight.in_features]
        for table in (weight.scales, weight.offsets)
    )
    return codes.mul_(scales).add_(offsets).to(dtype)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Return codes 0..15 [..., n] uint8 as [..., n / 2] bytes: element 2i low, 2i + 1 high."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Return the [..., 2n] codes of [..., n] bytes, the inverse of `pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
