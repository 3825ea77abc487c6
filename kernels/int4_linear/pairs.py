"""The GPU's layout of an INT4 weight: groups of inputs in pairs, two codes of a pair's groups in one byte."""

from dataclasses import dataclass, replace
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.kernels.int4_linear.weight import Int4Weight, unpack_nibbles

_STEP_BYTES: Final = 64  # of one output that the kernel reads in one turn of its loop, at least
_PACK_ELEMENTS: Final = 1 << 24  # codes unpacked at once while repacking


@dataclass(frozen=True, slots=True)
class PairedInt4:
    """An INT4 weight whose groups 2p and 2p + 1 share the bytes of pair p.

    `codes` is [pairs, out, group_size] uint8: byte j of a pair holds code j of its first group in the low nibble and
    of its second in the high one, so that each nibble of a run of bytes meets a run of inputs. `params` is [pairs, 2,
    out] int32: the group's float16 scale in the low half, its offset in the high one. What the input lacks of whole
    groups and of the last pairs is zero. Both may be views of some outputs of a larger weight, the last dimensions
    are dense.
    """

    codes: Tensor
    params: Tensor
    group_size: int
    in_features: int
    out_features: int

    def __post_init__(self) -> None:
        pairs = pairs_of(self.in_features, self.group_size)
        expected = (pairs, self.out_features, self.group_size), (pairs, 2, self.out_features)
        found = tuple(self.codes.shape), tuple(self.params.shape)
        if found != expected or (self.codes.dtype, self.params.dtype) != (torch.uint8, torch.int32):
            raise ValueError(
                f"paired INT4 codes and params are {found} {self.codes.dtype} {self.params.dtype}, "
                f"expected {expected} torch.uint8 torch.int32"
            )

    @property
    def nbytes(self) -> int:
        """Bytes that the weight holds."""
        return self.codes.nbytes + self.params.nbytes

    def rows(self, start: int, stop: int) -> "PairedInt4":
        """The weight of outputs `start` to `stop` - 1 alone: views, no copies."""
        return replace(
            self,
            codes=self.codes[:, start:stop],
            params=self.params[:, :, start:stop],
            out_features=stop - start,
        )

    def pick(self, outputs: Tensor) -> "PairedInt4":
        """The weight of some outputs alone, [n] int64 in the order wanted: copies."""
        return replace(
            self,
            codes=self.codes[:, outputs],
            params=self.params[:, :, outputs],
            out_features=len(outputs),
        )


def unroll_of(group_size: int) -> int:
    """Pairs that the kernel reads in one turn of its loop."""
    return max(1, _STEP_BYTES // max(32, group_size))


def pairs_of(in_features: int, group_size: int) -> int:
    """Pairs of groups of a weight, filled up to whole turns of the kernel's loop."""
    pairs = -(-in_features // (2 * group_size))
    return -(-pairs // unroll_of(group_size)) * unroll_of(group_size)


def pack_pairs(weight: Int4Weight) -> PairedInt4:
    """Return the weight in the GPU's layout; a slice of its outputs at a time is unpacked."""
    pairs, outputs = pairs_of(weight.in_features, weight.group_size), weight.out_features
    device = weight.codes.device
    codes = torch.empty((pairs, outputs, weight.group_size), dtype=torch.uint8, device=device)
    params = torch.empty((pairs, 2, outputs), dtype=torch.int32, device=device)
    together = max(1, _PACK_ELEMENTS // weight.in_features)
    missing = 2 * pairs * weight.group_size - weight.in_features
    for start in range(0, outputs, together):
        part = slice(start, start + together)
        nibbles = F.pad(unpack_nibbles(weight.codes[part]), (0, missing))
        nibbles = nibbles.view(len(nibbles), pairs, 2, weight.group_size)
        codes[:, part] = (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).transpose(0, 1)
        tables = (
            torch.stack((weight.scales[part], weight.offsets[part]), dim=-1).view(torch.int32).squeeze(-1)
        )
        tables = F.pad(tables, (0, 2 * pairs - weight.groups))
        params[:, :, part] = tables.t().reshape(pairs, 2, -1)
    return PairedInt4(codes, params, weight.group_size, weight.in_features, outputs)
