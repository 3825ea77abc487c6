"""Exit heads and gates against naive formulas, row by row."""

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from exeunt.compression.exit_output import ExitOutput, Shortlist
from exeunt.compression.exits import (
    ExitHead,
    ExitHeadError,
    ExitJudge,
    ExitProbe,
    _sigmoid,
    exit_metadata,
    exit_tensors,
    exits_from_tensors,
    needs_newest_format,
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


def _judge(seed: int = 2) -> ExitJudge:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return ExitJudge(random(5, UNITS) / 5, random(UNITS) / 5, random(UNITS) / 2, random())


SHORTLIST = Shortlist(torch.tensor([0, 3, 4, 8, 9, 17, 21, 30, 36]))


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
    head, output = _head(screen_ratio=1.0), _Output()
    hidden = torch.randn(5, HIDDEN)
    for thresholds in (torch.full((5,), torch.inf), torch.full((5,), 1.1)):
        result = head.gate(hidden, thresholds, output)
        assert output.calls == []
        assert result.leaves.tolist() == [False] * 5
        assert result.confidence.tolist() == [0.0] * 5
        assert result.looked.tolist() == []
        assert result.logits.shape[0] == 0


def test_rows_that_may_not_leave_are_not_projected() -> None:
    head, output = _head(screen_ratio=0.0), _Output()
    thresholds = torch.tensor([0.0, math.inf, 0.0, math.inf])
    result = head.gate(torch.randn(4, HIDDEN), thresholds, output)
    # a ratio of 0 screens nobody, and infinity still keeps a row from leaving
    assert result.looked.tolist() == [0, 2]
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
    head = _head(kind).to("cpu", dtype)
    head = replace(head, judge=_judge() if judged else None, shortlist=SHORTLIST if listed else None)
    hidden = torch.randn(33, HIDDEN, generator=torch.Generator().manual_seed(5)).to(dtype)
    thresholds = torch.linspace(0.05, 0.99, 33)
    thresholds[7] = math.inf
    hidden[11, 3] = math.nan
    for output in _outputs(dtype):
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
    head = replace(_head(), judge=_judge(), shortlist=SHORTLIST if listed else None)
    hidden = torch.randn(19, HIDDEN, generator=torch.Generator().manual_seed(6))
    thresholds = torch.full((19,), 0.4)
    for output in _outputs(torch.float32):
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
    head, (output, _) = _head(), _outputs(torch.float32)
    with pytest.raises(ValueError, match="hidden is"):
        head.gate(torch.randn(2, HIDDEN + 1), torch.zeros(2), output)
    with pytest.raises(ValueError, match="thresholds are"):
        head.gate(torch.randn(2, HIDDEN), torch.zeros(3), output)


@pytest.mark.parametrize("judged", [False, True])
def test_a_shortlist_of_all_tokens_is_none_to_the_bit(judged: bool) -> None:
    plain = replace(_head(), judge=_judge() if judged else None)
    listed = replace(plain, shortlist=Shortlist(torch.arange(VOCAB)))
    hidden = torch.randn(21, HIDDEN, generator=torch.Generator().manual_seed(7))
    for output in _outputs(torch.float32):
        without, given = (head.gate(hidden, torch.full((21,), 0.5), output) for head in (plain, listed))
        assert 0 < int(without.leaves.sum()) < 21
        assert torch.equal(given.confidence, without.confidence)
        assert torch.equal(given.leaves, without.leaves)
        assert torch.equal(given.looked, without.looked)
        assert torch.equal(given.logits, without.logits)


def test_a_shortlist_decides_by_its_own_tokens_and_says_what_all_say() -> None:
    """Confidence is that of a model with no other tokens; whoever leaves has the whole vocabulary's logits."""
    head = replace(_head(screen_ratio=0.0), shortlist=SHORTLIST)
    hidden = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(8))
    output, few = _Output(), _Output()
    few.weight = output.weight[SHORTLIST.ids]
    result = head.gate(hidden, torch.full((40,), 0.6), output)
    _, confidences, _ = _naive(head, hidden, few.weight)
    _, _, logits = _naive(head, hidden, output.weight)
    # the log-odds of a few tokens soon reach float32's cap
    torch.testing.assert_close(result.confidence, torch.tensor(confidences), rtol=1e-4, atol=1e-3)
    assert 0 < int(result.leaves.sum()) < 40
    torch.testing.assert_close(result.logits.double(), logits[result.leaves], rtol=1e-4, atol=1e-4)
    outside = ~torch.isin(result.logits.argmax(-1), SHORTLIST.ids)
    assert bool(outside.any()), "no token that left lies outside the shortlist: the test shows nothing"


@pytest.mark.parametrize("listed", [False, True])
def test_a_judge_is_the_probe_with_log_probabilities_added(listed: bool) -> None:
    judge = _judge()
    head = replace(_head(screen_ratio=0.0), judge=judge, shortlist=SHORTLIST if listed else None)
    hidden, output = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(10)), _Output()
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


def test_only_rows_that_leave_are_projected_onto_all_tokens() -> None:
    asked: list[tuple[int, int]] = []  # rows and outputs of every projection

    class Counted(FullLinear):
        def __call__(self, x: Tensor) -> Tensor:
            asked.append((len(x), self.out_features))
            return super().__call__(x)

        def pick(self, outputs: Tensor) -> "Counted":
            return Counted(self.weight[outputs])

    weight = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(9))
    output, head = ExitOutput(Counted(weight), torch.float32), replace(_head(), shortlist=SHORTLIST)
    hidden = torch.randn(30, HIDDEN, generator=torch.Generator().manual_seed(11))
    result = head.gate(hidden, torch.full((30,), 0.5), output)
    left = int(result.leaves.sum())
    assert 0 < left < len(result.looked) < 30
    assert asked == [(len(result.looked), len(SHORTLIST)), (left, VOCAB)]
    asked.clear()
    nobody = replace(head, screen_ratio=0.0).gate(hidden, torch.full((30,), 1.5), output)
    assert nobody.logits.shape[0] == 0
    assert asked == [(30, len(SHORTLIST))], "a look in vain costs the shortlist alone"


def test_exits_and_variants_share_the_rows_of_one_shortlist() -> None:
    output = _outputs(torch.float32)[1]
    again, other = ExitOutput(output.linear, torch.float32), Shortlist(torch.tensor([1, 2]))
    same = Shortlist(SHORTLIST.ids.clone())
    picked = output.only(SHORTLIST)
    assert output.only(same) is again.only(same) is picked
    assert output.only(other) is not picked
    assert output.shortlist_bytes > again.shortlist_bytes > 0
    # INT4 comes in panels of some outputs: nine rows take a whole one or two
    assert again.shortlist_bytes < output.linear.nbytes
    with pytest.raises(ValueError, match="names token 40, the output matrix has 37"):
        output.only(Shortlist(torch.tensor([3, 40])))


def test_what_is_no_shortlist_is_refused() -> None:
    for ids in ([4], [3, 3], [5, 2], [-1, 4], [[1, 2]]):
        with pytest.raises(ValueError, match="shortlist"):
            Shortlist(torch.tensor(ids))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        Shortlist(torch.tensor([1.0, 2.0]))
    with pytest.raises(ExitHeadError, match="the judge looks at 5 tokens, the shortlist has 2"):
        replace(_head(), judge=_judge(), shortlist=Shortlist(torch.tensor([1, 2])))
    judge = ExitJudge(torch.zeros(2, 3), torch.zeros(3), torch.zeros(3), torch.zeros(()))
    with pytest.raises(ExitHeadError, match="the judge reads 3 units, the probe has 16"):
        replace(_head(), judge=judge)


def test_judges_and_shortlists_survive_the_bundle_names() -> None:
    plain, listed = _head(block=1), replace(_head(block=5), judge=_judge(), shortlist=SHORTLIST)
    assert not needs_newest_format([plain])
    assert needs_newest_format([plain, replace(plain, judge=_judge())])
    assert needs_newest_format([plain, replace(plain, shortlist=SHORTLIST)])
    before = [plain, listed]
    tensors = exit_tensors(before)
    again = exits_from_tensors(tensors, exit_metadata(before))
    assert again[0].judge is None
    assert again[0].shortlist is None
    assert again[1].shortlist is not None
    assert torch.equal(again[1].shortlist.ids, SHORTLIST.ids)
    hidden, output = torch.randn(8, HIDDEN), _Output()
    for head, read in zip(before, again, strict=True):
        assert torch.equal(
            head.gate(hidden, torch.full((8,), 0.4), output).confidence,
            read.gate(hidden, torch.full((8,), 0.4), output).confidence,
        )
    del tensors["block_5.judge.hidden_bias"]
    with pytest.raises(ExitHeadError, match=r"block_5\.judge\.hidden_bias"):
        exits_from_tensors(tensors, exit_metadata(before))
    tensors = exit_tensors(before) | {"block_5.shortlist": torch.tensor([4, 4])}
    with pytest.raises(ExitHeadError, match="block_5: a shortlist's tokens must ascend"):
        exits_from_tensors(tensors, exit_metadata(before))


def test_a_rows_nan_is_its_own_trouble() -> None:
    head, output = _head(), _Output()
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
