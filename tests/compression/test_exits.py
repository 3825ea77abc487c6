"""Exit heads and gates against naive formulas, row by row."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from exeunt.compression.exits import (
    _sigmoid,
)
from exeunt.kernels.exit_gate.reference import gate_features
from exeunt.kernels.native.library import native_library
from tests.compression.exit_heads import (
    HIDDEN,
    SHORTLIST,
    VOCAB,
    CountingOutput,
    NormKind,
    exit_head,
    exit_judge,
    exit_outputs,
    naive_gate,
)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_gate_follows_its_formula(kind: NormKind) -> None:
    head, output = exit_head(kind), CountingOutput()
    hidden = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(1))
    thresholds = torch.linspace(0.05, 0.99, 40)
    probes, confidences, logits = naive_gate(head, hidden, output.weight)

    result = head.gate(hidden, thresholds, output)

    passing = [row for row in range(40) if probes[row] >= head.screen_ratio * float(thresholds[row])]
    assert result.looked.tolist() == passing
    assert 0 < len(passing) < 40
    assert output.calls == [len(passing)]
    expected = [confidences[row] if row in passing else 0.0 for row in range(40)]
    torch.testing.assert_close(result.confidence, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    leaves = [row in passing and confidences[row] >= float(thresholds[row]) for row in range(40)]
    assert result.leaves.tolist() == leaves
    assert 0 < sum(leaves) < len(passing)
    torch.testing.assert_close(result.logits.double(), logits[result.leaves], rtol=1e-4, atol=1e-4)


def test_nothing_is_projected_when_no_row_passes() -> None:
    head, output = exit_head(screen_ratio=1.0), CountingOutput()
    hidden = torch.randn(5, HIDDEN)
    for thresholds in (torch.full((5,), torch.inf), torch.full((5,), 1.1)):
        result = head.gate(hidden, thresholds, output)
        assert output.calls == []
        assert result.leaves.tolist() == [False] * 5
        assert result.confidence.tolist() == [0.0] * 5
        assert result.looked.tolist() == []
        assert result.logits.shape[0] == 0


def test_rows_that_may_not_leave_are_not_projected() -> None:
    head, output = exit_head(screen_ratio=0.0), CountingOutput()
    thresholds = torch.tensor([0.0, math.inf, 0.0, math.inf])
    result = head.gate(torch.randn(4, HIDDEN), thresholds, output)
    # a ratio of 0 screens nobody, and infinity still keeps a row from leaving
    assert result.looked.tolist() == [0, 2]
    assert result.leaves.tolist() == [True, False, True, False]
    assert result.confidence[1] == 0
    assert result.confidence[3] == 0


def test_a_row_decides_the_same_alone_and_in_a_crowd() -> None:
    head, output = exit_head("layer"), CountingOutput()
    hidden = torch.randn(32, HIDDEN, generator=torch.Generator().manual_seed(3))
    thresholds = torch.full((32,), 0.6)
    together = head.gate(hidden, thresholds, output)
    for row in range(32):
        alone = head.gate(hidden[row : row + 1], thresholds[:1], output)
        # library matmuls may round differently for one row: no decision here stands within that margin
        assert abs(float(together.confidence[row]) - 0.6) > 1e-5
        assert bool(alone.leaves[0]) == bool(together.leaves[row])
        torch.testing.assert_close(alone.confidence[0], together.confidence[row], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "judged", "listed"),
    [
        ("rms", False, False),
        ("layer", True, False),
        ("rms", True, True),
        ("layer", False, True),
    ],
)
def test_one_native_call_decides_as_the_steps_do(
    kind: NormKind, judged: bool, listed: bool, dtype: torch.dtype
) -> None:
    head = exit_head(kind).to("cpu", dtype)
    head = replace(head, judge=exit_judge() if judged else None, shortlist=SHORTLIST if listed else None)
    hidden = torch.randn(33, HIDDEN, generator=torch.Generator().manual_seed(5)).to(dtype)
    thresholds = torch.linspace(0.05, 0.99, 33)
    thresholds[7] = math.inf
    hidden[11, 3] = math.nan
    for output in exit_outputs(dtype):
        assert output.matrix is not None
        native = head.gate(hidden, thresholds, output)
        steps = head.gate(hidden, thresholds, output.__call__)  # a plain callable: one step after the other
        assert native.looked.tolist() == steps.looked.tolist()
        assert 0 < len(native.looked) < 32
        assert torch.equal(native.logits, steps.logits)
        assert torch.equal(native.confidence, steps.confidence)
        assert native.leaves.tolist() == steps.leaves.tolist()
        assert 0 < int(native.leaves.sum()) < len(native.looked)


@pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)
@pytest.mark.parametrize("listed", [False, True])
def test_the_native_gate_gives_a_row_the_same_bits_in_any_batch(listed: bool) -> None:
    head = replace(exit_head(), judge=exit_judge(), shortlist=SHORTLIST if listed else None)
    hidden = torch.randn(19, HIDDEN, generator=torch.Generator().manual_seed(6))
    thresholds = torch.full((19,), 0.4)
    for output in exit_outputs(torch.float32):
        together = head.gate(hidden, thresholds, output)
        leaving = together.leaves.nonzero().flatten().tolist()
        logits = dict(zip(leaving, together.logits, strict=True))
        assert 0 < len(leaving) < 19
        for row in range(19):
            alone = head.gate(hidden[row : row + 1], thresholds[:1], output)
            assert float(alone.confidence[0]) == float(together.confidence[row])
            assert bool(alone.leaves[0]) == bool(together.leaves[row])
            if row in logits:
                assert torch.equal(alone.logits[0], logits[row])


@pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)
def test_a_gate_refuses_what_does_not_fit() -> None:
    head, (output, _) = exit_head(), exit_outputs(torch.float32)
    with pytest.raises(ValueError, match="hidden is"):
        head.gate(torch.randn(2, HIDDEN + 1), torch.zeros(2), output)
    with pytest.raises(ValueError, match="thresholds are"):
        head.gate(torch.randn(2, HIDDEN), torch.zeros(3), output)


@pytest.mark.parametrize("listed", [False, True])
def test_a_judge_is_the_probe_with_log_probabilities_added(listed: bool) -> None:
    judge = exit_judge()
    head = replace(exit_head(screen_ratio=0.0), judge=judge, shortlist=SHORTLIST if listed else None)
    hidden, output = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(10)), CountingOutput()
    result = head.gate(hidden, torch.zeros(12), output)
    for row in range(12):
        state = head.read(hidden[row : row + 1])[0].double()[0]
        logits = output.weight.double() @ state
        if listed:
            logits = logits[SHORTLIST.ids]
        log_p = sorted((logits - logits.exp().sum().log()).tolist(), reverse=True)
        units = head.probe.hidden_weight.double() @ state + head.probe.hidden_bias.double()
        units = units + torch.tensor(log_p[:5]).double() @ judge.top_weight.double() + judge.hidden_bias
        units = units * 0.5 * (1 + torch.erf(units / math.sqrt(2)))
        opinion = float(units @ judge.output_weight.double() + judge.output_bias)
        features = [opinion, log_p[0] - math.log(-math.expm1(log_p[0])), log_p[0] - log_p[1], 1.0]
        score = sum(w * f for w, f in zip(head.combine.tolist(), features, strict=True))
        assert float(result.confidence[row]) == pytest.approx(1 / (1 + math.exp(-score)), rel=1e-4)


def test_a_rows_nan_is_its_own_trouble() -> None:
    head, output = exit_head(), CountingOutput()
    hidden = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(4))
    thresholds = torch.zeros(6)
    clean = head.gate(hidden, thresholds, output)
    hidden[2, 5] = math.nan
    result = head.gate(hidden, thresholds, output)
    assert clean.leaves.all()
    assert result.leaves.tolist() == [True, True, False, True, True, True]
    assert result.looked.tolist() == [0, 1, 3, 4, 5]
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(result.confidence[others], clean.confidence[others])


def test_logits_that_are_nan_keep_the_row() -> None:
    def project(state: Tensor) -> Tensor:
        return torch.full((state.shape[0], VOCAB), torch.nan)

    result = exit_head().gate(torch.randn(3, HIDDEN), torch.zeros(3), project)
    assert result.leaves.tolist() == [False] * 3


def test_certainty_stays_finite() -> None:
    logits = torch.tensor([[1e4, 0.0, 0.0], [0.0, 0.0, 0.0]])
    features = gate_features(torch.zeros(2), logits)
    assert torch.isfinite(features).all()
    assert features[0, 1] > 13
    assert float(features[1, 1]) == pytest.approx(math.log(0.5), abs=1e-5)


def test_bfloat16_keeps_the_decision_in_float32() -> None:
    head = exit_head().to("cpu", torch.bfloat16)
    output = CountingOutput()
    output.weight = output.weight.bfloat16()
    result = head.gate(torch.randn(4, HIDDEN).bfloat16(), torch.full((4,), 0.1), output)
    assert head.adapter.dtype == torch.bfloat16
    assert head.probe.hidden_weight.dtype == torch.float32
    assert result.confidence.dtype == torch.float32
    assert result.logits.dtype == torch.float32


def test_the_screen_rounds_alike_in_any_company() -> None:
    logits = torch.linspace(-6, 6, 4099)
    together = _sigmoid(logits)
    torch.testing.assert_close(together, logits.sigmoid())
    for size in (1, 7, 33, 64):
        parts = [_sigmoid(part) for part in logits.split(size)]
        assert torch.equal(torch.cat(parts), together)
