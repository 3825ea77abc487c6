"""The full-precision linear: native against PyTorch, and rows that do not see each other."""

import pytest
import torch

from exeunt.kernels.full_linear import full_linear
from exeunt.kernels.full_linear.reference import full_linear_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 123), (7, 16), (64, 192), (33, 520)])
@pytest.mark.parametrize("bias", [False, True])
def test_agrees_with_pytorch(seed: int, dtype: torch.dtype, outputs: int, inputs: int, bias: bool) -> None:
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    shift = torch.randn(outputs).to(dtype) if bias else None
    x = torch.randn(11, inputs).to(dtype)
    expected = full_linear_reference(x.float(), weight.float(), None if shift is None else shift.float())
    out = full_linear(x, weight, shift)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [40, 192, 700])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_in_any_company(
    seed: int, dtype: torch.dtype, inputs: int, threads: int
) -> None:
    weight, x = torch.randn(999, inputs).to(dtype), torch.randn(300, inputs).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = full_linear(x, weight)
        for start, stop in ((0, 1), (1, 3), (7, 10), (20, 24), (31, 300)):
            assert torch.equal(full_linear(x[start:stop], weight), whole[start:stop])
    finally:
        torch.set_num_threads(before)


def test_nan_stays_in_its_row(seed: int) -> None:
    x, weight = torch.randn(6, 50), torch.randn(9, 50)
    clean = full_linear(x, weight)
    x[2, 49] = float("nan")
    out = full_linear(x, weight)
    assert bool(out[2].isnan().all())
    keep = [0, 1, 3, 4, 5]
    assert torch.equal(out[keep], clean[keep])


def test_shapes_keep_their_leading_dimensions_and_may_be_empty() -> None:
    weight = torch.randn(5, 8)
    assert full_linear(torch.randn(2, 3, 8), weight).shape == (2, 3, 5)
    assert full_linear(torch.randn(0, 8), weight).shape == (0, 5)


def test_gradients_flow_where_they_are_wanted() -> None:
    weight = torch.randn(5, 8, requires_grad=True)
    full_linear(torch.ones(2, 8), weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((5, 8), 2.0))
    bias = torch.zeros(5, requires_grad=True)
    full_linear(torch.ones(2, 8), weight.detach(), bias).sum().backward()
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.full((5,), 2.0))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"7 features, the weight is \[5, 8\]"):
        full_linear(torch.randn(2, 7), torch.randn(5, 8))
    with pytest.raises(ValueError, match=r"the bias \[4\]"):
        full_linear(torch.randn(2, 8), torch.randn(5, 8), torch.randn(4))
