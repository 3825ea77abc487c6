"""Full-precision linears give the product however many rows there are."""

from typing import Any

import pytest
import torch

from exeunt.compression.linear import FullLinear
from exeunt.kernels.full_linear import full_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 40, 90])  # 2 to 81 rows of 50 go the other way round
def test_the_product_is_right_for_any_number_of_rows(rows: int, biased: bool, dtype: torch.dtype) -> None:
    seed = torch.Generator().manual_seed(rows)
    weight = torch.randn(33, 50, generator=seed).to(dtype)
    bias = torch.randn(33, generator=seed).to(dtype) if biased else None
    x = torch.randn(rows, 50, generator=seed).to(dtype)
    exact = x.double() @ weight.double().t() + (bias.double() if bias is not None else 0.0)
    tolerance: dict[str, Any] = (
        {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 1e-2}
    )
    layer = FullLinear(weight, bias)
    got = layer(x)
    assert got.is_contiguous()
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, **tolerance)
    torch.testing.assert_close(layer.rows(4, 20)(x).double(), exact[:, 4:20], **tolerance)
    residual = torch.randn(rows, 33, generator=seed).to(dtype)
    expected = residual.double() + exact
    assert layer.add_to(residual, x) is residual
    torch.testing.assert_close(residual.double(), expected, **tolerance)


def test_strided_input_is_taken_as_it_is() -> None:
    wide, weight = torch.randn(5, 60), torch.randn(7, 30)
    torch.testing.assert_close(full_linear(wide[:, 30:], weight), wide[:, 30:] @ weight.t())
