"""Exit heads and gates against naive formulas, row by row."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from exeunt.compression.exit_output import ExitOutput
from exeunt.compression.exits import (
    ExitHead,
    ExitHeadError,
    ExitProbe,
    _sigmoid,
    exit_metadata,
    exit_tensors,
    exits_from_tensors,
)
from exeunt.compression.linear import FullLinear, Int4Linear
from exeunt.compression.norm import Norm
from exeunt.kernels.exit_gate.reference import gate_features
from exeunt.kernels.int4_linear import quantize
from exeunt.kernels.native.library import native_library

NormKind = Literal["rms", "layer"]
HIDDEN, UNITS, VOCAB = 24, 16, 37


def _head(kind: NormKind = "rms", block: int = 3, screen_ratio: float = 0.5, seed: int = 0) -> ExitHead:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    norm = Norm(kind, 1 + 0.1 * random(HIDDEN), random(HIDDEN) if kind == "layer" else None, 1e-5)
    probe = ExitProbe(random(UNITS, HIDDEN) / 5, random(UNITS), random(UNITS) / 2, random())
    combine = torch.tensor([0.7, 0.4, 0.2, -0.3])
    return ExitHead(block, norm, random(HIDDEN, HIDDEN) / 10, probe, combine, screen_ratio)


class _Output:
    """An output matrix that counts the rows it is asked for."""

    def __init__(self) -> None:
        self.weight = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(9))
        self.calls: list[int] = []

    def __call__(self, state: Tensor) -> Tensor:
        self.calls.append(state.shape[0])
        return state @ self.weight.T


def _naive(head: ExitHead, hidden: Tensor, output: Tensor) -> tuple[list[float], list[float], Tensor]:
    """Probe probability, confidence and logits of each row, in float64, from the formulas alone."""
    probes, confidences, all_logits = [], [], []
    for row in hidden.double():
        if head.norm.kind == "layer":
            normed = (row - row.mean()) / (row.var(unbiased=False) + head.norm.eps).sqrt()
        else:
            normed = row / (row.pow(2).mean() + head.norm.eps).sqrt()
        normed = normed * head.norm.weight.double()
        if head.norm.bias is not None:
            normed = normed + head.norm.bias.double()
        state = normed + head.adapter.double() @ normed
        units = head.probe.hidden_weight.double() @ state + head.probe.hidden_bias.double()
        units = units * 0.5 * (1 + torch.erf(units / math.sqrt(2)))
        probe = float(units @ head.probe.output_weight.double() + head.probe.output_bias)
        logits = output.double() @ state
        ordered = sorted(logits.tolist(), reverse=True)
        p = math.exp(ordered[0]) / sum(math.exp(value) for value in ordered)
        features = [probe, math.log(p / (1 - p)), ordered[0] - ordered[1], 1.0]
        score = sum(w * f for w, f in zip(head.combine.tolist(), features, strict=True))
        probes.append(1 / (1 + math.exp(-probe)))
        confidences.append(1 / (1 + math.exp(-score)))
        all_logits.append(logits)
    return probes, confidences, torch.stack(all_logits)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_gate_follows_its_formula(kind: NormKind) -> None:
    head, output = _head(kind), _Output()
    hidden = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(1))
    thresholds = torch.linspace(0.05, 0.99, 40)
    probes, confidences, logits = _naive(head, hidden, output.weight)

    result = head.gate(hidden, thresholds, output)

    passing = [row for row in range(40) if probes[row] >= head.screen_ratio * float(thresholds[row])]
    assert result.projected.tolist() == passing
    assert 0 < len(passing) < 40
    assert output.calls == [len(passing)]
    torch.testing.assert_close(result.logits.double(), logits[passing], rtol=1e-4, atol=1e-4)
    expected = [confidences[row] if row in passing else 0.0 for row in range(40)]
    torch.testing.assert_close(result.confidence, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    leaves = [row in passing and confidences[row] >= float(thresholds[row]) for row in range(40)]
    assert result.leaves.tolist() == leaves
    assert 0 < sum(leaves) < len(passing)


def test_nothing_is_projected_when_no_row_passes() -> None:
    head, output = _head(screen_ratio=1.0), _Output()
    hidden = torch.randn(5, HIDDEN)
    for thresholds in (torch.full((5,), torch.inf), torch.full((5,), 1.1)):
        result = head.gate(hidden, thresholds, output)
        assert output.calls == []
        assert result.leaves.tolist() == [False] * 5
        assert result.confidence.tolist() == [0.0] * 5
        assert result.projected.tolist() == []
        assert result.logits.shape[0] == 0


def test_rows_that_may_not_leave_are_not_projected() -> None:
    head, output = _head(screen_ratio=0.0), _Output()
    thresholds = torch.tensor([0.0, math.inf, 0.0, math.inf])
    result = head.gate(torch.randn(4, HIDDEN), thresholds, output)
    # a ratio of 0 screens nobody, and infinity still keeps a row from leaving
    assert result.projected.tolist() == [0, 2]
    assert result.leaves.tolist() == [True, False, True, False]
    assert result.confidence[1] == 0
    assert result.confidence[3] == 0


def test_a_row_decides_the_same_alone_and_in_a_crowd() -> None:
    head, output = _head("layer"), _Output()
    hidden = torch.randn(32, HIDDEN, generator=torch.Generator().manual_seed(3))
    thresholds = torch.full((32,), 0.6)
    together = head.gate(hidden, thresholds, output)
    for row in range(32):
        alone = head.gate(hidden[row : row + 1], thresholds[:1], output)
        # library matmuls may round differently for one row: no decision here stands within that margin
        assert abs(float(together.confidence[row]) - 0.6) > 1e-5
        assert bool(alone.leaves[0]) == bool(together.leaves[row])
        torch.testing.assert_close(alone.confidence[0], together.confidence[row], rtol=1e-5, atol=1e-6)


def _outputs(dtype: torch.dtype) -> list[ExitOutput]:
    """The output matrix in full precision and in INT4."""
    weight = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(9))
    return [
        ExitOutput(FullLinear(weight.to(dtype)), dtype),
        ExitOutput(Int4Linear(quantize(weight, 8)), dtype),
    ]


@pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_one_native_call_decides_as_the_steps_do(kind: NormKind, dtype: torch.dtype) -> None:
    head = _head(kind).to("cpu", dtype)
    hidden = torch.randn(33, HIDDEN, generator=torch.Generator().manual_seed(5)).to(dtype)
    thresholds = torch.linspace(0.05, 0.99, 33)
    thresholds[7] = math.inf
    hidden[11, 3] = math.nan
    for output in _outputs(dtype):
        assert output.matrix is not None
        native = head.gate(hidden, thresholds, output)
        steps = head.gate(hidden, thresholds, output.__call__)  # a plain callable: one step after the other
        assert native.projected.tolist() == steps.projected.tolist()
        assert 0 < len(native.projected) < 32
        assert torch.equal(native.logits, steps.logits)
        assert torch.equal(native.confidence, steps.confidence)
        assert native.leaves.tolist() == steps.leaves.tolist()
        assert 0 < int(native.leaves.sum()) < len(native.projected)


@pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)
def test_the_native_gate_gives_a_row_the_same_bits_in_any_batch() -> None:
    head = _head()
    hidden = torch.randn(19, HIDDEN, generator=torch.Generator().manual_seed(6))
    thresholds = torch.full((19,), 0.4)
    for output in _outputs(torch.float32):
        together = head.gate(hidden, thresholds, output)
        logits = dict(zip(together.projected.tolist(), together.logits, strict=True))
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
    head, (output, _) = _head(), _outputs(torch.float32)
    with pytest.raises(ValueError, match="hidden is"):
        head.gate(torch.randn(2, HIDDEN + 1), torch.zeros(2), output)
    with pytest.raises(ValueError, match="thresholds are"):
        head.gate(torch.randn(2, HIDDEN), torch.zeros(3), output)


def test_a_rows_nan_is_its_own_trouble() -> None:
    head, output = _head(), _Output()
    hidden = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(4))
    thresholds = torch.zeros(6)
    clean = head.gate(hidden, thresholds, output)
    hidden[2, 5] = math.nan
    result = head.gate(hidden, thresholds, output)
    assert clean.leaves.all()
    assert result.leaves.tolist() == [True, True, False, True, True, True]
    assert result.projected.tolist() == [0, 1, 3, 4, 5]
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(result.confidence[others], clean.confidence[others])


def test_logits_that_are_nan_keep_the_row() -> None:
    def project(state: Tensor) -> Tensor:
        return torch.full((state.shape[0], VOCAB), torch.nan)

    result = _head().gate(torch.randn(3, HIDDEN), torch.zeros(3), project)
    assert result.leaves.tolist() == [False] * 3


def test_certainty_stays_finite() -> None:
    logits = torch.tensor([[1e4, 0.0, 0.0], [0.0, 0.0, 0.0]])
    features = gate_features(torch.zeros(2), logits)
    assert torch.isfinite(features).all()
    assert features[0, 1] > 13
    assert float(features[1, 1]) == pytest.approx(math.log(0.5), abs=1e-5)


def test_bfloat16_keeps_the_decision_in_float32() -> None:
    head = _head().to("cpu", torch.bfloat16)
    output = _Output()
    output.weight = output.weight.bfloat16()
    result = head.gate(torch.randn(4, HIDDEN).bfloat16(), torch.full((4,), 0.1), output)
    assert head.adapter.dtype == torch.bfloat16
    assert head.probe.hidden_weight.dtype == torch.float32
    assert result.confidence.dtype == torch.float32
    assert result.logits.dtype == torch.float32


@pytest.mark.parametrize("kinds", [("rms", "rms"), ("layer", "layer")])
def test_heads_survive_the_bundle_names(kinds: tuple[NormKind, NormKind]) -> None:
    heads = [_head(kinds[0], block=9, seed=1), _head(kinds[1], block=4, seed=2, screen_ratio=1.0)]
    again = exits_from_tensors(exit_tensors(heads), exit_metadata(heads))
    assert [(head.name, head.depth) for head in again] == [("block_4", 5), ("block_9", 10)]
    output, hidden = _Output(), torch.randn(8, HIDDEN)
    for before, after in zip(sorted(heads, key=lambda head: head.block), again, strict=True):
        thresholds = torch.full((8,), 0.4)
        assert torch.equal(
            before.gate(hidden, thresholds, output).confidence,
            after.gate(hidden, thresholds, output).confidence,
        )


def test_heads_that_are_incomplete_are_refused() -> None:
    heads = [_head()]
    tensors, metadata = exit_tensors(heads), exit_metadata(heads)
    with pytest.raises(ExitHeadError, match=r"incomplete: 'exits'"):
        exits_from_tensors(tensors, {})
    del tensors["block_3.adapter"]
    with pytest.raises(ExitHeadError, match=r"block_3\.adapter"):
        exits_from_tensors(tensors, metadata)


def test_shapes_and_settings_that_do_not_fit_are_refused() -> None:
    good = _head()
    with pytest.raises(ExitHeadError, match=r"block_3: adapter is \[2, 2\], it must be \[24, 24\]"):
        ExitHead(3, good.norm, torch.zeros(2, 2), good.probe, good.combine, 0.5)
    with pytest.raises(ExitHeadError, match=r"screen_ratio is 1\.5"):
        ExitHead(3, good.norm, good.adapter, good.probe, good.combine, 1.5)


def test_the_screen_rounds_alike_in_any_company() -> None:
    logits = torch.linspace(-6, 6, 4099)
    together = _sigmoid(logits)
    torch.testing.assert_close(together, logits.sigmoid())
    for size in (1, 7, 33, 64):
        parts = [_sigmoid(part) for part in logits.split(size)]
        assert torch.equal(torch.cat(parts), together)
