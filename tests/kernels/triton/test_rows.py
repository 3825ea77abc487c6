"""Norms in Triton: against PyTorch, and rows that do not see each other."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from exeunt.kernels.rows.reference import layer_norm_reference, rms_norm_reference
from exeunt.kernels.rows.triton import layer_norm_triton, rms_norm_triton

# The interpreter computes with numpy, which warns of what kernels do on purpose: NaN and infinity in arithmetic.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning"),
    pytest.mark.usefixtures("seed", "poisoned"),
]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def _same_rounding(dtype: torch.dtype, device: str) -> float:
    """How near two results lie that are rounded at the same places; the interpreter cuts bfloat16 off instead."""
    return TOLERANCE[dtype] if device == "cpu" and dtype == torch.bfloat16 else TOLERANCE[dtype] / 4


def _distance(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [1, 5, 64, 123, 5000])
def test_agrees_with_pytorch(device: str, dtype: torch.dtype, size: int) -> None:
    x = (torch.randn(7, size, device=device) * 3 + 0.5).to(dtype)
    weight, bias = torch.randn(size, device=device).to(dtype), torch.randn(size, device=device).to(dtype)
    wide = (x.float(), weight.float(), bias.float())
    out = rms_norm_triton(x, weight, 1e-5)
    assert out.dtype == dtype
    assert _distance(out, rms_norm_reference(*wide[:2], 1e-5)) < TOLERANCE[dtype]
    assert _distance(out, rms_norm_reference(x, weight, 1e-5)) < _same_rounding(dtype, device)
    layered = layer_norm_triton(x, weight, bias, 1e-5)
    assert layered.dtype == dtype
    assert _distance(layered, layer_norm_reference(*wide, 1e-5)) < TOLERANCE[dtype]
    for row in (0, 6):
        part = slice(row, row + 1)
        assert torch.equal(rms_norm_triton(x[part], weight, 1e-5), out[part])
        assert torch.equal(layer_norm_triton(x[part], weight, bias, 1e-5), layered[part])


def test_a_row_is_rounded_before_its_weight(device: str) -> None:
    x, weight = torch.randn(7, 123, device=device).half(), torch.randn(123, device=device).half()
    out, expected = rms_norm_triton(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5)
    assert int((out != expected).sum()) <= 8  # of 861, for another order of summation


def test_layer_norm_without_weight_or_bias(device: str) -> None:
    x = torch.randn(3, 2, 33, device=device)
    weight = torch.randn(33, device=device)
    for scale, bias in ((None, None), (weight, None), (None, weight)):
        out, expected = layer_norm_triton(x, scale, bias, 1e-5), layer_norm_reference(x, scale, bias, 1e-5)
        assert _distance(out, expected) < 1e-5


@pytest.mark.parametrize("size", [64, 80, 96, 128])
def test_heads_have_their_own_weights_and_are_read_where_they_lie(device: str, size: int) -> None:
    fused = torch.randn(5, 7, size, device=device).bfloat16()
    heads, weight = fused[:, 1:4], torch.randn(3, size, device=device).bfloat16()
    assert not heads.is_contiguous()
    out = rms_norm_triton(heads, weight, 1e-6)
    expected = rms_norm_reference(heads.contiguous(), weight, 1e-6)
    assert _distance(out, expected) < _same_rounding(torch.bfloat16, device)
    assert torch.equal(rms_norm_triton(heads[:, 2], weight[2], 1e-6), out[:, 2])


def test_rows_do_not_see_each_other(device: str) -> None:
    rows = torch.randn(33, 200, device=device).bfloat16()
    weight = torch.randn(200, device=device).bfloat16()
    whole = rms_norm_triton(rows, weight, 1e-6)
    layered = layer_norm_triton(rows, weight, weight, 1e-6)
    for count in (1, 2, 3, 16, 17) if device == "cuda" else (1, 3, 17):
        assert torch.equal(rms_norm_triton(rows[-count:], weight, 1e-6), whole[-count:])
        assert torch.equal(layer_norm_triton(rows[-count:], weight, weight, 1e-6), layered[-count:])
    rows[3, 7], rows[5, 0] = torch.nan, torch.inf
    spoilt = rms_norm_triton(rows, weight, 1e-6)
    assert bool(spoilt[3].isnan().all())
    keep = [row for row in range(33) if row not in (3, 5)]
    assert torch.equal(spoilt[keep], whole[keep])
    assert torch.equal(layer_norm_triton(rows, weight, weight, 1e-6)[keep], layered[keep])


def test_views_and_nothing_at_all(device: str) -> None:
    weight, columns = torch.randn(48, device=device), torch.randn(48, 6, device=device)
    assert torch.equal(
        rms_norm_triton(columns.T, weight, 1e-6), rms_norm_triton(columns.T.contiguous(), weight, 1e-6)
    )
    wide = torch.randn(6, 100, device=device)[:, 10:58]  # not aligned as 48 promises
    assert torch.equal(
        layer_norm_triton(wide, weight, weight, 1e-6),
        layer_norm_triton(wide.contiguous(), weight, weight, 1e-6),
    )
    assert rms_norm_triton(wide[:0], weight, 1e-6).shape == (0, 48)
    assert layer_norm_triton(wide[:0], weight, None, 1e-6).shape == (0, 48)


def test_shapes_that_do_not_fit_are_refused(device: str) -> None:
    x = torch.randn(4, 8, device=device)
    with pytest.raises(ValueError, match=r"weight is \[7\], the rows are \[4, 8\]"):
        rms_norm_triton(x, torch.ones(7, device=device), 1e-6)
    with pytest.raises(ValueError, match=r"bias is \[9\], the rows are \[4, 8\]"):
        layer_norm_triton(x, None, torch.ones(9, device=device), 1e-6)


def test_shapes_are_known_without_data(device: str) -> None:
    with FakeTensorMode():
        x, weight = (
            torch.empty(4, 8, dtype=torch.bfloat16, device=device),
            torch.empty(8, dtype=torch.bfloat16),
        )
        assert rms_norm_triton(x, weight, 1e-6).shape == (4, 8)
        assert layer_norm_triton(x, weight, None, 1e-6).dtype == torch.bfloat16
