"""RMS norm, rotary embedding and gated SiLU: native against PyTorch, and rows that do not see each other."""

import pytest
import torch

from exeunt.kernels.rows import rms_norm, rotate_heads, silu_mul
from exeunt.kernels.rows.reference import rms_norm_reference, rotate_heads_reference, silu_mul_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # one unit in the last place


def close(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert out.dtype == expected.dtype
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance * 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [5, 123, 256])
def test_rms_norm(seed: int, dtype: torch.dtype, size: int) -> None:
    wide, weight = (torch.randn(9, 2 * size) * 3).to(dtype), torch.randn(size).to(dtype)
    x = wide[:, size:]
    out = rms_norm(x, weight, 1e-5)
    close(out, rms_norm_reference(x, weight, 1e-5))
    assert torch.equal(torch.cat([rms_norm(row[None], weight, 1e-5) for row in x]), out)
    assert rms_norm(x[:0], weight, 1e-5).shape == (0, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [5, 123, 256])
def test_silu_mul(seed: int, dtype: torch.dtype, size: int) -> None:
    x = (torch.randn(9, 2 * size) * 5).to(dtype)
    x[0, 0], x[1, 0] = -500.0, 500.0
    out = silu_mul(x)
    close(out, silu_mul_reference(x))
    assert torch.equal(torch.cat([silu_mul(row[None]) for row in x]), out)
    x[2, 0] = float("nan")
    assert bool(silu_mul(x)[2, 0].isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 10, 48, 128])
def test_rotate_heads_in_place(seed: int, dtype: torch.dtype, head_dim: int) -> None:
    fused = torch.randn(7, 5, head_dim).to(dtype)
    table = torch.randn(7, 2, head_dim).to(dtype)
    cosines, sines = table[:, 0:1], table[:, 1:2]
    before, expected = fused.clone(), fused.clone()
    rotate_heads_reference(expected[:, :3], cosines, sines)
    rotate_heads(fused[:, :3], cosines, sines)
    close(fused, expected)
    assert torch.equal(fused[:, 3:], before[:, 3:])  # the values beside the queries and keys


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight is \[4\], expected a dense \[8\]"):
        rms_norm(torch.randn(2, 8), torch.randn(4), 1e-5)
    with pytest.raises(ValueError, match="7 values"):
        silu_mul(torch.randn(2, 7))
