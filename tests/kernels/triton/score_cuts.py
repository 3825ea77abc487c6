"""Limits on what is drawn from, hard ones among them, and how alike two ways of cutting by them must be."""

from collections.abc import Sequence

import torch
from torch import Tensor

HARD = [
    (1.0, 0, 0.9),
    (0.7, 5, 1.0),
    (1.3, 40, 0.5),
    (1.0, 0, 1.0),  # no limit
    (0.0, 3, 0.5),  # greedy
    (0.01, 0, 0.999),
    (2.0, 1, 1.0),
    (1.0, 10_000, 0.3),  # more than there are
    (1.0, 0, 1e-9),
    (100.0, 7, 0.999999),
]


def limits_of(limits: Sequence[tuple[float, int, float]], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Temperatures float32, top-k int32 and top-p float64 of some rows."""
    temperatures, top_k, top_p = zip(*limits, strict=True)
    return (
        torch.tensor(temperatures, dtype=torch.float32, device=device),
        torch.tensor(top_k, dtype=torch.int32, device=device),
        torch.tensor(top_p, dtype=torch.float64, device=device),
    )


def assert_cut_alike(
    found: Tensor, expected: Tensor, scores: Tensor, limits: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Alike but for the one token at the border of a nucleus, whose mass float32 may round to either side of it, and
    for those whose probability is next to nothing."""
    kept, wanted = found.isfinite(), expected.isfinite()
    assert torch.equal(found[kept], scores[kept])
    probs = (scores.double() / limits[0].clamp_min(1e-30)[:, None]).softmax(-1)
    differ = ((kept != wanted) & (probs > 1e-30)).sum(1)
    assert int(differ.max()) <= 1
    assert not bool(differ[limits[2] >= 1].any())
    assert int(differ.sum()) <= 2  # of ten rows
