"""An exit's state, probe and confidence: native against PyTorch, and rows that do not see each other."""

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
