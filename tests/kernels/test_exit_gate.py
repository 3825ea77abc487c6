"""An exit's state, probe and confidence: native against PyTorch, and rows that do not see each other."""

import copy
from dataclasses import replace

import pytest
import torch

from exeunt.kernels.exit_gate import (
    Confirmation,
    ExitWeights,
    GateRule,
    JudgeWeights,
    exit_gate,
    exit_state,
    gate_confidence,
)
from exeunt.kernels.exit_gate.reference import exit_state_reference, gate_confidence_reference
from exeunt.kernels.native.descriptors import Matrix
from exeunt.kernels.native.library import native_library

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


def _weights(size: int, units: int, dtype: torch.dtype, layer: bool) -> ExitWeights:
    return ExitWeights(
        (1 + torch.randn(size) / 5).to(dtype),
        torch.randn(size).to(dtype) if layer else None,
        1e-5,
        (torch.randn(size, size) / size**0.5).to(dtype),
        (torch.randn(units, size) / size**0.5, torch.randn(units), torch.randn(units), torch.randn(())),
    )


def _judge(units: int, count: int) -> JudgeWeights:
    return JudgeWeights(
        (torch.randn(count, units), torch.randn(units), torch.randn(units) / units**0.5, torch.randn(()))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "units"), [(5, 3), (48, 64), (123, 17)])
@pytest.mark.parametrize("layer", [False, True])
def test_state_and_probe(seed: int, dtype: torch.dtype, size: int, units: int, layer: bool) -> None:
    weights = _weights(size, units, dtype, layer)
    hidden = (torch.randn(9, size) * 3).to(dtype)
    state, logit, read = exit_state(hidden, weights)
    norm = (weights.norm, weights.norm_bias, weights.eps)
    expected, expected_logit, expected_units = exit_state_reference(
        hidden, norm, weights.adapter, weights.probe
    )
    tolerance = TOLERANCE[dtype]
    assert state.dtype == dtype
    assert logit.dtype == read.dtype == torch.float32
    torch.testing.assert_close(read, expected_units, atol=20 * tolerance, rtol=tolerance)
    torch.testing.assert_close(state, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(logit, expected_logit, atol=20 * tolerance, rtol=tolerance)
    for row in range(9):
        alone, alone_logit, alone_units = exit_state(hidden[row : row + 1], weights)
        assert torch.equal(alone[0], state[row])
        assert torch.equal(alone_logit[0], logit[row])
        assert torch.equal(alone_units[0], read[row])


@pytest.mark.parametrize("vocab", [2, 37, 4096, 5003])
def test_confidence(seed: int, vocab: int) -> None:
    logits, probe = torch.randn(11, vocab) * 4, torch.randn(11)
    logits[3, 1] = 60.0  # as sure as float32 can be
    combine = torch.tensor([0.7, 0.4, 0.2, -0.3])
    sure = gate_confidence(probe, logits, combine)
    torch.testing.assert_close(sure, gate_confidence_reference(probe, logits, combine), atol=1e-5, rtol=1e-5)
    rows = [gate_confidence(probe[i : i + 1], logits[i : i + 1], combine) for i in range(11)]
    assert torch.equal(torch.cat(rows), sure)


@pytest.mark.parametrize(
    ("vocab", "units", "count"), [(2, 3, 2), (37, 17, 8), (5003, 64, 16), (8, 64, 8), (300, 5, 3)]
)
def test_a_judge_sees_the_largest_log_probabilities(seed: int, vocab: int, units: int, count: int) -> None:
    logits, read, judge = torch.randn(11, vocab) * 3, torch.randn(11, units), _judge(units, count)
    logits[4] = logits[4].sort().values  # every one is the largest so far
    logits[5] = logits[5].sort(descending=True).values
    logits[6] = 1.0  # all alike
    combine = torch.tensor([0.7, 0.4, 0.2, -0.3])
    probe = torch.full((11,), torch.nan)  # nobody asks the probe where there is a judge
    sure = gate_confidence(probe, logits, combine, read, judge)
    expected = gate_confidence_reference(probe, logits, combine, read, judge.parts)
    torch.testing.assert_close(sure, expected, atol=1e-5, rtol=1e-4)
    rows = [
        gate_confidence(probe[i : i + 1], logits[i : i + 1], combine, read[i : i + 1], judge)
        for i in range(11)
    ]
    assert torch.equal(torch.cat(rows), sure)
    logits[3, 1] = torch.nan
    spoilt = gate_confidence(probe, logits, combine, read, judge)
    assert bool(spoilt[3].isnan())
    assert torch.equal(spoilt[[0, 1, 2, 4]], sure[[0, 1, 2, 4]])


def test_a_judge_of_nothing_is_its_probe(seed: int) -> None:
    """Without log-probabilities and with the probe's own output the second opinion is the first."""
    weights, hidden = _weights(24, 7, torch.float32, False), torch.randn(5, 24)
    _, logit, read = exit_state(hidden, weights)
    judge = JudgeWeights((torch.zeros(4, 7), torch.zeros(7), weights.probe[2], weights.probe[3]))
    logits, combine = torch.randn(5, 40), torch.tensor([1.0, 0.5, 0.1, 0.0])
    torch.testing.assert_close(
        gate_confidence(logit, logits, combine, read, judge), gate_confidence(logit, logits, combine)
    )


def test_a_judge_that_does_not_fit_is_refused(seed: int) -> None:
    logits, combine, judge = torch.randn(3, 5), torch.ones(4), _judge(6, 4)
    with pytest.raises(ValueError, match=r"the units are missing, the judge takes \[3, 6\]"):
        gate_confidence(torch.zeros(3), logits, combine, None, judge)
    with pytest.raises(ValueError, match=r"the units are \[3, 5\], the judge takes \[3, 6\]"):
        gate_confidence(torch.zeros(3), logits, combine, torch.zeros(3, 5), judge)
    with pytest.raises(ValueError, match="the largest 4 of only 3 logits"):
        gate_confidence(torch.zeros(3), logits[:, :3], combine, torch.zeros(3, 6), judge)
    with pytest.raises(ValueError, match=r"expected \[count, units\]"):
        JudgeWeights((torch.zeros(4, 6), torch.zeros(5), torch.zeros(6), torch.zeros(())))
    with pytest.raises(ValueError, match="sees 17 log-probabilities, it may see 2 to 16"):
        _judge(6, 17)


@pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)
def test_the_native_gate_checks_what_it_is_given(seed: int) -> None:
    weights, rule = _weights(8, 4, torch.float32, False), GateRule(torch.ones(4), 0.5)
    weight = torch.randn(20, 8)
    output, few = Matrix(weight.data_ptr(), None, 0, 8, 20), Matrix(weight.data_ptr(), None, 0, 8, 5)
    hidden, limits = torch.randn(3, 8), torch.zeros(3)
    assert exit_gate(hidden, limits, weights, rule, output, few) is not None
    with pytest.raises(ValueError, match="the shortlist gives 20 of only 5 logits"):
        exit_gate(hidden, limits, weights, rule, few, output)
    with pytest.raises(ValueError, match="the output matrix takes 7 and gives 5"):
        exit_gate(hidden, limits, weights, rule, output, Matrix(weight.data_ptr(), None, 0, 7, 5))
    with pytest.raises(ValueError, match="the judge reads 4 units and 6 logits"):
        exit_gate(hidden, limits, weights, replace(rule, judge=_judge(4, 6)), output, few)
    with pytest.raises(ValueError, match="the judge reads 3 units and 2 logits"):
        exit_gate(hidden, limits, weights, replace(rule, judge=_judge(3, 2)), output, few)
    last = Confirmation(torch.ones(4), 0.5, _judge(4, 6))
    assert exit_gate(hidden, limits, weights, replace(rule, confirmation=last), output, few) is not None
    with pytest.raises(ValueError, match="a confirmation and no shortlist"):
        exit_gate(hidden, limits, weights, replace(rule, confirmation=last), output)
    odd = replace(last, combine=torch.ones(3))
    with pytest.raises(ValueError, match=r"the confirmation's combine is \[3\]"):
        exit_gate(hidden, limits, weights, replace(rule, confirmation=odd), output, few)
    odd = replace(last, judge=_judge(3, 6))
    with pytest.raises(ValueError, match="the confirmation's judge reads 3 units and 6 logits"):
        exit_gate(hidden, limits, weights, replace(rule, confirmation=odd), output, few)


@pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("listed", [0, 40])
def test_a_gate_does_not_see_its_threads(dtype: torch.dtype, listed: int) -> None:
    """Threads share rows: decisions, logits and who was asked are those of one thread, in the same order."""
    torch.manual_seed(24)
    rows, size, units, vocab = 53, 96, 16, 300  # enough for threads to share
    weights, weight = _weights(size, units, dtype, False), torch.randn(vocab, size).to(dtype)
    combine = torch.tensor([0.6, 0.3, 0.2, -0.5])
    last = Confirmation(combine, 0.8, _judge(units, 6)) if listed else None
    rule = GateRule(combine, 0.6, judge=_judge(units, 4), confirmation=last)
    output = Matrix(weight.data_ptr(), None, 0, size, vocab)
    few = Matrix(weight.data_ptr(), None, 0, size, listed) if listed else None
    hidden, thresholds = torch.randn(rows, size).to(dtype), torch.linspace(0.02, 0.9, rows)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(exit_gate(hidden, thresholds, weights, rule, output, few))
    finally:
        torch.set_num_threads(before)
    alone = results[0]
    assert alone is not None
    for shared in results[1:]:
        assert shared is not None
        assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))
    _, leaves, looked, _, logits = alone
    assert 0 < len(logits) == int(leaves.sum()) < len(looked) < rows


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
    expected, _, _ = exit_state(hidden, weights)
    copied = copy.deepcopy(weights)
    weights.adapter.zero_()
    weights.norm.zero_()
    assert torch.equal(exit_state(hidden, copied)[0], expected)


def test_gradients_reach_the_weights() -> None:
    weights = _weights(8, 3, torch.float32, False)
    weights.adapter.requires_grad_()
    combine = torch.ones(4, requires_grad=True)
    judge = _judge(3, 4)
    judge.parts[0].requires_grad_()
    state, logit, units = exit_state(torch.randn(5, 8), weights)
    gate_confidence(logit, state, combine, units, judge).sum().backward()
    assert weights.adapter.grad is not None
    assert combine.grad is not None
    assert judge.parts[0].grad is not None
