"""RMS norm: native against PyTorch, and rows that do not see each other."""

import pytest
import torch

from exeunt.kernels.rows import rms_norm
from exeunt.kernels.rows.reference import rms_norm_reference

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


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight is \[4\], expected a dense \[8\]"):
        rms_norm(torch.randn(2, 8), torch.randn(4), 1e-5)
