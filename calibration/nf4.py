"""NF4: sixteen levels at the quantiles of a normal distribution, times the largest magnitude of a group.

QLoRA's data type (Dettmers et al., arXiv 2305.14314, appendix E), for comparison only: levels off a grid have no
integer product, and no kernel here reads them.
"""

from typing import Final

import torch
from torch import Tensor

LEVELS: Final = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_ELEMENTS: Final = 1 << 24  # weights rounded at once


def nf4(weight: Tensor, group_size: int) -> Tensor:
    """`weight` [out, in] as NF4 holds it, float32: each weight at the level nearest to it.

    `group_size` inputs share a scale, the largest magnitude among them in float16; the last group may be shorter. That
    takes 4 + 16 / `group_size` bits a weight.
    """
    restored = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    rows = max(1, _ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        restored[start : start + rows] = _rounded(weight[start : start + rows].float(), group_size)
    return restored


def _rounded(weight: Tensor, group_size: int) -> Tensor:
    levels = torch.tensor(LEVELS, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    parts = [
        _rounded_groups(part.reshape(len(part), -1, min(group_size, part.shape[1])), levels, between)
        for part in weight.tensor_split([weight.shape[1] // group_size * group_size], dim=1)
        if part.shape[1]
    ]
    return torch.cat(parts, dim=1)


def _rounded_groups(groups: Tensor, levels: Tensor, between: Tensor) -> Tensor:
    """`groups` [rows, groups, size] float32 at their levels, [rows, groups × size]."""
    scale = groups.abs().amax(-1, keepdim=True).half().float()
    shares = groups / torch.where(scale > 0, scale, 1.0)
    return (levels[torch.bucketize(shares, between)] * scale).flatten(1)
