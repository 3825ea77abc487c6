"""An exit's state, probe and confidence: native against PyTorch, and rows that do not see each other."""

import copy
from dataclasses import replace

import pytest
import torch

from exeunt.kernels.exit_gate import ExitWeights, exit_state, gate_confidence
from exeunt.kernels.exit_gate.reference import exit_state_reference, gate_confidence_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


def _weights(size: int, units: int, dtype: torch.dtype, layer: bool) -> ExitWeights:
    return ExitWeights(
        (1 + torch.randn(size) / 5).to(dtype),
        torch.randn(size).to(dtype) if layer else None,
        1e-5,
        (torch.randn(size, size) / size**0.5).to(dtype),
        (torch.randn(units, size) / size**0.5, torch.randn(units), torch.randn(units), torch.randn(())),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "units"), [(5, 3), (48, 64), (123, 17)])
@pytest.mark.parametrize("layer", [False, True])
def test_state_and_probe(seed: int, dtype: torch.dtype, size: int, units: int, layer: bool) -> None:
    weights = _weights(size, units, dtype, layer)
    hidden = (torch.randn(9, size) * 3).to(dtype)
    state, logit = exit_state(hidden, weights)
    norm = (weights.norm, weights.norm_bias, weights.eps)
    expected, expected_logit = exit_state_reference(hidden, norm, weights.adapter, weights.probe)
    tolerance = TOLERANCE[dtype]
    assert state.dtype == dtype
    assert logit.dtype == torch.float32
    torch.testing.assert_close(state, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(logit, expected_logit, atol=20 * tolerance, rtol=tolerance)
    for row in range(9):
        alone, alone_logit = exit_state(hidden[row : row + 1], weights)
        assert torch.equal(alone[0], state[row])
        assert torch.equal(alone_logit[0], logit[row])


@pytest.mark.parametrize("vocab", [2, 37, 4096, 5003])
def test_confidence(seed: int, vocab: int) -> None:
    logits, probe = torch.randn(11, vocab) * 4, torch.randn(11)
    logits[3, 1] = 60.0  # as sure as float32 can be
    combine = torch.tensor([0.7, 0.4, 0.2, -0.3])
    sure = gate_confidence(probe, logits, combine)
    torch.testing.assert_close(sure, gate_confidence_reference(probe, logits, combine), atol=1e-5, rtol=1e-5)
    rows = [gate_confidence(probe[i : i + 1], logits[i : i + 1], combine) for i in range(11)]
    assert torch.equal(torch.cat(rows), sure)


def test_nan_stays_in_its_row(seed: int) -> None:
    logits, probe, combine = torch.randn(4, 50), torch.randn(4), torch.ones(4)
    clean = gate_confidence(probe, logits, combine)
    logits[1, 7] = float("nan")
    sure = gate_confidence(probe, logits, combine)
    assert bool(sure[1].isnan())
    assert torch.equal(sure[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_confidence_does_not_depend_on_a_constant_added_to_the_logits(seed: int, shift: float) -> None:
    # multiples of 2^-10, so that the shifted logits are exact too; tops from unsure to as sure as float32 can be
    logits, probe = (torch.randn(64, 300) * 1024).round() / 1024, torch.randn(64)
    logits[:, 5] += torch.arange(64) / 4
    combine = torch.tensor([0.1, 1.0, 0.05, -3.0])
    sure = gate_confidence(probe, logits, combine)
    shifted = gate_confidence(probe, logits + shift, combine)
    assert torch.equal(shifted, sure)
    expected = gate_confidence_reference(probe, logits + shift, combine)
    torch.testing.assert_close(shifted.logit(), expected.logit(), atol=0.05, rtol=0.01)
    torch.testing.assert_close(shifted, expected, atol=2e-5, rtol=1e-5)


def test_shapes_and_dtypes_that_do_not_fit_are_refused(seed: int) -> None:
    weights = _weights(8, 4, torch.float32, True)
    for hidden in (torch.zeros(3, 4), torch.zeros(3, 16), torch.zeros(8)):
        with pytest.raises(ValueError, match=r"hidden is .* expected \[tokens, 8\]"):
            exit_state(hidden, weights)
    with pytest.raises(ValueError, match=r"adapter is \[7, 8\], expected \[8, 8\]"):
        replace(weights, adapter=torch.zeros(7, 8))
    with pytest.raises(ValueError, match=r"norm_bias is \[1\]"):
        replace(weights, norm_bias=torch.zeros(1))
    for index in range(4):
        a, b, c, d = (
            torch.zeros(2, 3) if place == index else part for place, part in enumerate(weights.probe)
        )
        with pytest.raises(ValueError, match=r"the probe's .*, expected"):
            replace(weights, probe=(a, b, c, d))
    logits, combine = torch.randn(30, 5), torch.ones(4)
    for bad in (
        (torch.zeros(1), logits, combine),
        (torch.zeros(30), logits[:, :1], combine),
        (torch.zeros(30), logits, torch.ones(3)),
        (torch.zeros(30, 1), logits, combine),
    ):
        with pytest.raises(ValueError, match=r"are not \[K\], \[K, V\] with V at least 2, and \[4\]"):
            gate_confidence(*bad)
    for odd in (
        (torch.zeros(30).double(), logits, combine),
        (torch.zeros(30), logits.half(), combine),
        (torch.zeros(30), logits, combine.double()),
    ):
        with pytest.raises(TypeError, match="expected float32"):
            gate_confidence(*odd)


def test_a_deep_copy_reads_its_own_tensors(seed: int) -> None:
    weights = _weights(8, 4, torch.float32, True)
    hidden = torch.randn(3, 8)
    expected, _ = exit_state(hidden, weights)
    copied = copy.deepcopy(weights)
    weights.adapter.zero_()
    weights.norm.zero_()
    assert torch.equal(exit_state(hidden, copied)[0], expected)


def test_gradients_reach_the_weights() -> None:
    weights = _weights(8, 3, torch.float32, False)
    weights.adapter.requires_grad_()
    combine = torch.ones(4, requires_grad=True)
    state, logit = exit_state(torch.randn(5, 8), weights)
    gate_confidence(logit, state, combine).sum().backward()
    assert weights.adapter.grad is not None
    assert combine.grad is not None
