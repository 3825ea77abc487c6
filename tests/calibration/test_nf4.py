"""NF4 against its definition, and where it should win and lose."""

import pytest
import torch

from exeunt.calibration.nf4 import LEVELS, nf4
from exeunt.kernels.int4_linear import dequantize, quantize


def test_levels_are_those_of_a_normal_distribution() -> None:
    """Appendix E of arXiv 2305.14314: quantiles, eight on each side of an exact zero, the outermost at ±1."""
    offset = 0.5 * (1 - 1 / 32 + 1 - 1 / 30)
    normal = torch.distributions.Normal(0.0, 1.0)
    upper = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1]).tolist()
    lower = (-normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])).tolist()
    expected = torch.tensor(sorted([*upper, 0.0, *lower])) / max(upper)
    torch.testing.assert_close(torch.tensor(LEVELS), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("inputs", "group"), [(64, 16), (70, 16), (6, 16), (33, 1)])
def test_every_weight_goes_to_the_nearest_level(inputs: int, group: int) -> None:
    weight = torch.randn(9, inputs, generator=torch.Generator().manual_seed(1))
    restored = nf4(weight, group)
    for start in range(0, inputs, group):
        part = weight[:, start : start + group]
        scale = part.abs().amax(-1, keepdim=True).half().float()
        grid = torch.tensor(LEVELS) * scale[..., None]
        missed = (part[..., None] - grid).abs().amin(-1)
        torch.testing.assert_close((restored[:, start : start + group] - part).abs(), missed)


def test_zeros_stay_zeros() -> None:
    assert bool((nf4(torch.zeros(3, 40), 16) == 0).all())


def test_levels_of_a_normal_distribution_do_not_suit_an_even_one() -> None:
    """At 5 bits a weight, scales counted; to a uniform distribution an even grid fits better."""
    g = torch.Generator().manual_seed(2)
    even = torch.rand(200, 320, generator=g) - 0.5
    uniform = (dequantize(quantize(even, 32), torch.float32) - even).square().mean()
    assert float((nf4(even, 16) - even).square().mean()) > 1.2 * float(uniform)
