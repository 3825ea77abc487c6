"""The GPU's full-precision linear against PyTorch's, and rows that do not know each other, to the bit."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from exeunt.kernels.full_linear import triton as module
from exeunt.kernels.full_linear.triton import full_linear_triton
from exeunt.kernels.linear_tiles import Tile
from tests.kernels.triton.linear_checks import (
    IEEE_WARNINGS,
    MASKED_ROWS,
    ROW_CALLS,
    TOLERANCE,
    LinearCall,
    captured,
    check_linear_call,
    check_masked_tiles,
    check_row_in_every_call,
    finished,
    linear_calls,
    poisoned_memory,
    relative_error,
)

pytestmark = IEEE_WARNINGS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("dtype", "outputs", "inputs", "tokens"),
    [
        (BF16, 70, 323, 1),
        (BF16, 64, 512, 33),
        (FP16, 129, 600, 3),
        (FP32, 65, 578, 17),
        (FP32, 3, 7, 2),
        (BF16, 1, 1, 1),
    ],
)
def test_result_is_pytorchs(
    seed: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    outputs: int,
    inputs: int,
    tokens: int,
) -> None:
    weight = torch.randn(outputs, inputs, device=device).to(dtype)
    x = torch.randn(tokens, inputs, device=device).to(dtype)
    bias = torch.randn(outputs, device=device).to(dtype)
    with poisoned_memory(monkeypatch):
        out = full_linear_triton(x, weight, bias)
    assert out.dtype == dtype
    expected = x.double() @ weight.double().t() + bias.double()
    assert relative_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_gated_result_is_rounded_wherever_separate_operations_round(
    seed: int, device: str, dtype: torch.dtype
) -> None:
    x, weight = torch.randn(9, 64, device=device).to(dtype), torch.randn(80, 64, device=device).to(dtype) / 8
    out = full_linear_triton(x, weight, activation="silu", gated=True)
    expected = finished(full_linear_triton(x, weight), dtype, "silu", gated=True)
    assert int((out != expected).sum()) <= 5  # of 360, for another exponential


@pytest.mark.parametrize("call", linear_calls(Tile(128, 128, 4, 8)))
def test_epilogues(seed: int, device: str, monkeypatch: pytest.MonkeyPatch, call: LinearCall) -> None:
    weight = (torch.randn(50, call.inputs, device=device) / call.inputs**0.5).to(call.dtype)
    check_linear_call(monkeypatch, module, full_linear_triton, weight, weight, call, device)


@pytest.mark.parametrize("call", ROW_CALLS, ids=str)
def test_row_has_the_same_bits_in_every_call(
    seed: int, device: str, monkeypatch: pytest.MonkeyPatch, call: tuple[torch.dtype, int, bool, list[int]]
) -> None:
    weight = torch.randn(40, call[1], device=device).to(call[0])
    check_row_in_every_call(monkeypatch, module, lambda x: full_linear_triton(x, weight), call, device)


def test_some_outputs_have_the_whole_layers_bits(seed: int, device: str) -> None:
    weight, x = (torch.randn(rows, 544, device=device).bfloat16() for rows in (70, 2))
    whole = full_linear_triton(x, weight)
    assert torch.equal(full_linear_triton(x, weight[5:40]), whole[:, 5:40])


@pytest.mark.parametrize(("tokens", "there"), MASKED_ROWS)
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(("gated", "added"), [(True, False), (False, True)])
def test_tiles_of_which_all_rows_are_missing_are_left_as_they_were(
    seed: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    there: list[int],
    split: bool,
    gated: bool,
    added: bool,
) -> None:
    weight = torch.randn(80 if gated else 40, 512, device=device).bfloat16()
    forms = {"split": split, "gated": gated, "added": added}
    check_masked_tiles(monkeypatch, module, full_linear_triton, weight, tokens, there, device, **forms)


def test_nan_stays_in_its_row(seed: int, device: str) -> None:
    weight = torch.randn(40, 512, device=device)
    x = torch.randn(4, 512, device=device)
    clean = full_linear_triton(x, weight)
    x[1, 7] = float("nan")
    out = full_linear_triton(x, weight)
    assert torch.equal(out[[0, 2, 3]], clean[[0, 2, 3]])
    assert bool(out[1].isnan().all())


def test_strided_inputs_and_no_rows(seed: int, device: str) -> None:
    wide, weight = torch.randn(4, 3, 193, device=device), torch.randn(96, 24, device=device).t()
    expected = full_linear_triton(wide[:, 1, 1:97].contiguous(), weight.contiguous())
    assert torch.equal(full_linear_triton(wide[:, 1, 1:97], weight), expected)
    assert full_linear_triton(wide[:0, 0, :96], weight).shape == (0, 24)


def test_what_does_not_fit_is_refused(device: str) -> None:
    weight, x = torch.randn(24, 96, device=device), torch.randn(2, 96, device=device)
    with pytest.raises(ValueError, match="95 features"):
        full_linear_triton(x[:, 1:], weight)
    with pytest.raises(TypeError, match="bfloat16"):
        full_linear_triton(x.bfloat16(), weight)
    with pytest.raises(ValueError, match="the bias is"):
        full_linear_triton(x, weight, x[0])
    numbers = torch.zeros(4, dtype=torch.int64, device=device)
    for positions in (numbers[:3], numbers[:2, None], numbers[:2].int(), numbers[::2]):
        with pytest.raises(ValueError, match="the positions are"):
            full_linear_triton(x, weight, positions=positions)


def test_fake_tensors_pass_through(device: str) -> None:
    with FakeTensorMode():
        x, weight = (torch.empty(rows, 96, dtype=BF16, device=device) for rows in (3, 24))
        out = full_linear_triton(x, weight, activation="silu", gated=True)
    assert out.shape == (3, 12)
    assert out.dtype == BF16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_graph_replays_to_the_same_bits(seed: int, tokens: int) -> None:
    weight, x = (torch.randn(rows, 2048, device="cuda").bfloat16() for rows in (4096, tokens))
    expected = full_linear_triton(x, weight)
    assert relative_error(expected, x.float() @ weight.float().t()) < TOLERANCE[BF16]
    for _ in range(20):  # programs arrive in another order every time
        assert torch.equal(full_linear_triton(x, weight), expected)
    assert torch.equal(captured(lambda: full_linear_triton(x, weight)), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("inputs", [4096, 8000, 14336])
def test_a_prompts_rows_are_summed_as_a_decoded_one(seed: int, dtype: torch.dtype, inputs: int) -> None:
    """The widest tile against the narrowest. A bias of minus the rounded result lays the sums' low bits bare."""
    weight = (torch.randn(4096, inputs, device="cuda") * 0.02).to(dtype)
    x = torch.randn(512, inputs, device="cuda").to(dtype)
    bias = -full_linear_triton(x[:1], weight)[0]
    alone = torch.cat([full_linear_triton(row, weight, bias) for row in x[:3, None]])
    for rows in (16, 64, 130, 512):
        assert torch.equal(full_linear_triton(x[:rows], weight, bias)[:3], alone), rows
    assert 0 < float(alone[0].abs().max()) < 0.01 * float(bias.abs().max())
