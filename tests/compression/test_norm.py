"""Norms against their definitions, in float64, and a token's norm against what stands beside it."""

import pytest
import torch

from exeunt.compression.norm import Norm, rms_norm


@pytest.mark.parametrize("size", [5, 48, 123])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])  # at the first, eps outweighs the state
def test_rms_norm_is_its_definition(size: int, scale: float) -> None:
    seed = torch.Generator().manual_seed(size)
    x, weight = torch.randn(7, size, generator=seed) * scale, torch.randn(size, generator=seed)
    exact = x.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    norm = Norm("rms", weight, None, 1e-5)
    for got in (norm(x), rms_norm(x, weight, 1e-5), norm.normalise(x) * weight):
        torch.testing.assert_close(got.double(), exact * weight.double(), rtol=2e-6, atol=1e-7)
    assert torch.equal(norm(torch.zeros(2, size)), torch.zeros(2, size))
    assert norm(torch.full((1, size), float("nan"))).isnan().all()


def test_sixteen_bits_round_before_the_weight_multiplies() -> None:
    seed = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 64, generator=seed).bfloat16(), torch.randn(64, generator=seed).bfloat16()
    wide = x.float()
    normalised = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert torch.equal(Norm("rms", weight, None, 1e-6)(x), weight * normalised)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_tokens_norm_does_not_depend_on_its_neighbours(kind: str) -> None:
    x, weight = torch.randn(33, 100), torch.randn(100)
    norm = Norm(kind, weight, torch.randn(100) if kind == "layer" else None, 1e-6)  # type: ignore[arg-type]
    together = norm(x)
    assert all(torch.equal(norm(x[i : i + 1]), together[i : i + 1]) for i in range(33))
