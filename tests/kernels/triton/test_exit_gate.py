"""An exit's state, confidence and decisions in Triton: against PyTorch, and rows that do not see each other."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import exeunt.kernels.gpu
from exeunt.kernels.exit_gate import (
    Confirmation,
    ExitWeights,
    GateRule,
    JudgeWeights,
    exit_state,
    gate_decisions,
    gate_rows,
)
from exeunt.kernels.exit_gate.decisions import gate_decisions_reference
from exeunt.kernels.exit_gate.reference import (
    exit_state_reference,
    gate_confidence_reference,
    probe_output_reference,
    probe_units_reference,
)
from exeunt.kernels.exit_gate.triton import decide_triton, gate_confidence_triton, probe_logit_triton
from exeunt.kernels.full_linear import full_linear

# The interpreter computes with numpy, which warns of what kernels do on purpose: NaN and infinity in arithmetic.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning"),
    pytest.mark.usefixtures("seed", "poisoned"),
]

STATE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions take the GPU's way, for tensors on a CPU too."""
    monkeypatch.setattr(exeunt.kernels.gpu, "interpreted", True)


def _judge(units: int, count: int, device: str) -> JudgeWeights:
    parts = (torch.randn(count, units), torch.randn(units), torch.randn(units) / units**0.5, torch.randn(()))
    a, b, c, d = (part.to(device) for part in parts)
    return JudgeWeights((a, b, c, d))


@pytest.mark.parametrize("units", [1, 17, 64])
def test_probe_logit(device: str, units: int) -> None:
    read, weight = torch.randn(9, units, device=device) * 3, torch.randn(units, device=device)
    bias = torch.randn((), device=device)
    found = probe_logit_triton(read, weight, bias)
    parts = (read, bias, weight, bias)
    torch.testing.assert_close(found, probe_output_reference(read, parts), atol=2e-5, rtol=1e-5)
    assert torch.equal(probe_logit_triton(read[4:5], weight, bias), found[4:5])
    assert probe_logit_triton(read[:0], weight, bias).shape == (0,)


@pytest.mark.parametrize(
    ("vocab", "units", "count"), [(2, 3, 2), (37, 17, 8), (2500, 64, 16), (8, 64, 8), (2048, 5, 0)]
)
def test_confidence(device: str, vocab: int, units: int, count: int) -> None:
    logits, read = torch.randn(9, vocab, device=device) * 3, torch.randn(9, units, device=device)
    logits[4] = logits[4].sort().values
    logits[5] = logits[5].sort(descending=True).values
    logits[6] = 1.0  # all alike
    logits[7, 1] = 90.0  # as sure as float32 can be
    if vocab > max(count, 2):
        logits[8, 0] = -torch.inf  # a token that is ruled out rules nobody out
    judge = _judge(units, count, device).parts if count else None
    combine = torch.tensor([0.7, 0.4, 0.2, -0.3], device=device)
    probe = torch.full((9,), torch.nan) if count else torch.randn(9)
    probe = probe.to(device)
    found = gate_confidence_triton(probe, logits, combine, read, judge)
    expected = gate_confidence_reference(probe, logits, combine, read, judge)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for row in (0, 5, 8) if device == "cuda" else (8,):
        part = slice(row, row + 1)
        alone = gate_confidence_triton(probe[part], logits[part], combine, read[part], judge)
        assert torch.equal(alone, found[part])
    logits[3, vocab - 1], logits[2, 0] = torch.nan, torch.inf
    spoilt = gate_confidence_triton(probe, logits, combine, read, judge)
    assert spoilt[2:4].isnan().all()
    torch.testing.assert_close(spoilt[[0, 1, 4, 5]], found[[0, 1, 4, 5]], atol=0, rtol=0)


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_a_constant_added_to_the_logits_changes_nothing(device: str, shift: float) -> None:
    logits, probe = (
        (torch.randn(16, 1300, device=device) * 1024).round() / 1024,
        torch.randn(16, device=device),
    )
    logits[:, 5] += torch.arange(16, device=device) / 2
    combine = torch.tensor([0.1, 1.0, 0.05, -3.0], device=device)
    sure = gate_confidence_triton(probe, logits, combine, None, None)
    assert torch.equal(gate_confidence_triton(probe, logits + shift, combine, None, None), sure)


def _confirmed(
    device: str, rows: int, list_ratio: float, screen_ratio: float = 0.8
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], GateRule]:
    """Probes, units, a shortlist's logits, thresholds and all logits of rows that end at each step of a gate.

    Every third leaves; of the others some are turned away by the list, some by all logits; every fifth may not leave.
    """
    (probe, read, listed, _), _ = _decided(device, rows, True)
    whole = torch.cat((listed, torch.randn(rows, 1100, device=device) * 2), dim=1)
    judges, combines, sure = (_judge(7, 4, device), _judge(7, 6, device)), [], []
    for logits, judge in zip((listed, whole), judges, strict=True):
        combine = torch.tensor([0.5, 0.4, 0.3, 0.0], device=device)
        said = gate_confidence_reference(probe, logits, combine, read, judge.parts)
        combine[3] = -said.logit(1e-6).median()  # half of the rows above one half, half below
        combines.append(combine)
        sure.append(gate_confidence_reference(probe, logits, combine, read, judge.parts))
    (first, confirmed), last = sure, Confirmation(combines[1], list_ratio, judges[1])
    past_probe = probe.sigmoid() / screen_ratio if screen_ratio else torch.ones_like(probe)
    past_list = first / list_ratio if list_ratio else torch.ones_like(first)
    before, kind = past_list.minimum(past_probe), torch.arange(rows, device=device) % 3
    thresholds = 0.9 * confirmed.minimum(before)
    thresholds = torch.where((kind == 1) & (confirmed < before), (confirmed + before) / 2, thresholds)
    thresholds = torch.where((kind == 2) & (past_list < past_probe), (past_list + past_probe) / 2, thresholds)
    thresholds[::5] = torch.inf
    return (probe, read, listed, thresholds, whole), GateRule(combines[0], screen_ratio, judges[0], last)


@pytest.mark.parametrize(("list_ratio", "screen_ratio"), [(0.0, 0.8), (0.9, 0.8), (1.0, 0.0)])
@pytest.mark.usefixtures("dispatched")
def test_confirmed_decisions(device: str, list_ratio: float, screen_ratio: float) -> None:
    for _ in range(9):  # until some rows pass the list and are turned away by all logits
        (probe, read, listed, thresholds, whole), rule = _confirmed(device, 33, list_ratio, screen_ratio)
        expected = gate_decisions_reference(probe, read, listed, thresholds, rule, whole)
        if int(expected[1].sum()) < int(expected[3].sum()):
            break
    found = gate_decisions(probe, read, listed, thresholds, rule, whole)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-4)
    for place in (1, 2, 3):
        assert torch.equal(found[place], expected[place])
    leaves, looked, passed = (int(part.sum()) for part in found[1:])
    assert 0 < leaves < passed <= looked < 33
    assert passed < looked or list_ratio == 0
    assert torch.equal(found[1], found[2] & (found[0] >= thresholds))
    row = int(found[1].nonzero()[-1])
    part = slice(row, row + 1)
    alone = gate_decisions(probe[part], read[part], listed[part], thresholds[part], rule, whole[part])
    assert all(torch.equal(one[0], every[row]) for one, every in zip(alone, found, strict=True))
    whole[row, 1500] = torch.nan  # outside the list: it passes that, and stays
    spoilt = gate_decisions(probe, read, listed, thresholds, rule, whole)
    assert torch.equal(spoilt[3], found[3])
    assert (spoilt[1] != found[1]).nonzero().flatten().tolist() == [row]


@pytest.mark.usefixtures("dispatched")
def test_a_confirmation_needs_all_logits(device: str) -> None:
    (probe, read, listed, thresholds, whole), rule = _confirmed(device, 6, 0.9)
    with pytest.raises(ValueError, match="a confirmation needs the whole vocabulary's logits"):
        gate_decisions(probe, read, listed, thresholds, rule)
    with pytest.raises(ValueError, match="a confirmation needs the whole vocabulary's logits"):
        gate_decisions(probe, read, listed, thresholds, GateRule(rule.combine, 0.8, rule.judge), whole)
    with pytest.raises(ValueError, match=r"logits are \[5, 2130\], not \[6, V\] with V at least 1030"):
        gate_decisions(probe, read, listed, thresholds, rule, whole[:5])


def _decided(device: str, rows: int, judged: bool) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], GateRule]:
    logits, read = torch.randn(rows, 1030, device=device) * 2, torch.randn(rows, 7, device=device)
    probe, judge = torch.randn(rows, device=device) + 1, _judge(7, 4, device) if judged else None
    combine = torch.tensor([0.7, 0.4, 0.2, 0.5], device=device)
    sure = gate_confidence_reference(probe, logits, combine, read, None if judge is None else judge.parts)
    thresholds = sure * torch.tensor([0.8, 1.2], device=device).repeat(rows)[:rows]
    thresholds[::5] = torch.inf
    return (probe, read, logits, thresholds), GateRule(combine, 0.8, judge)


@pytest.mark.parametrize("judged", [False, True])
@pytest.mark.usefixtures("dispatched")
def test_decisions(device: str, judged: bool) -> None:
    tensors, rule = _decided(device, 33, judged)
    found = gate_decisions(*tensors, rule)
    expected = gate_decisions_reference(*tensors, rule)
    near = (expected[0] - tensors[3]).abs() < 1e-5
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-4)
    assert torch.equal(found[1][~near], expected[1][~near])
    assert torch.equal(found[2], expected[2])
    assert found[1].dtype == found[2].dtype == torch.bool
    assert 1 < int(found[1].sum()) <= int(found[2].sum()) < 33
    for count in (1, 2, 3, 17) if device == "cuda" else (1, 3):
        a, b, c, d = (part[-count:] for part in tensors)
        assert all(map(torch.equal, gate_decisions(a, b, c, d, rule), (part[-count:] for part in found)))
    tensors[2][int(found[1].nonzero()[0]), 3] = torch.nan
    tensors[0][int(found[1].nonzero()[1])] = torch.nan
    spoilt = gate_decisions(*tensors, rule)
    changed = (spoilt[1] != found[1]).nonzero().flatten()
    assert torch.equal(changed, found[1].nonzero().flatten()[:2])
    a, b, c, d = (part[:0] for part in tensors)
    assert [part.shape for part in gate_decisions(a, b, c, d, rule)] == [(0,)] * 4


def test_a_row_that_is_as_sure_as_its_threshold_passes(device: str) -> None:
    logits, probe = torch.randn(2, 40, device=device), torch.zeros(2, device=device)
    combine, half = torch.tensor([0.7, 0.4, 0.2, 0.5], device=device), torch.full((2,), 0.5, device=device)
    sure = gate_confidence_triton(probe, logits, combine, None, None)
    assert bool(decide_triton(probe, logits, sure, 0.0, combine, None, None)[1].all())
    # the probe's opinion is a half, and so is how sure a shortlist was
    _, _, looked, passed = decide_triton(probe, logits, half, 1.0, combine, None, None, half, 1.0)
    assert bool(looked.all())
    assert bool(passed.all())


def test_no_row_passes_a_screen_of_nothing_at_an_infinite_threshold(device: str) -> None:
    (probe, read, logits, thresholds), rule = _decided(device, 6, False)
    found = decide_triton(probe, logits, thresholds, 0.0, rule.combine, read, None)
    assert found[2].tolist() == [False, True, True, True, True, False]
    assert found[0][[0, 5]].tolist() == [0.0, 0.0]


@pytest.mark.usefixtures("dispatched")
def test_what_does_not_fit_is_refused(device: str) -> None:
    (probe, read, logits, thresholds), rule = _decided(device, 6, True)
    with pytest.raises(
        ValueError, match=r"thresholds \[5\] and logits \[6, 1030\] are not \[6\] and \[6, S\]"
    ):
        gate_decisions(probe, read, logits, thresholds[:5], rule)
    with pytest.raises(ValueError, match="the largest 4 of only 3 logits"):
        gate_decisions(probe, read, logits[:, :3], thresholds, rule)


def test_shapes_are_known_without_data(device: str) -> None:
    with FakeTensorMode():
        row = torch.empty(5, device=device)
        combine = torch.empty(4, device=device)
        logits = torch.empty(5, 50, device=device)
        found = decide_triton(row, logits, row, 0.5, combine, None, None)
        assert [(part.shape[0], part.dtype) for part in found] == [
            (5, torch.float32),
            (5, torch.bool),
            (5, torch.bool),
            (5, torch.bool),
        ]
        sure = gate_confidence_triton(row, logits, combine, None, None)  # without thresholds
        assert (sure.shape, sure.dtype) == ((5,), torch.float32)
        units = torch.empty(5, 7, device=device)
        judge = (torch.empty(3, 7, device=device), units[0], units[0], torch.empty((), device=device))
        sure = gate_confidence_triton(row, logits, combine, units, judge)
        assert (sure.shape, sure.dtype) == ((5,), torch.float32)
        assert probe_logit_triton(
            logits, torch.empty(50, device=device), torch.empty((), device=device)
        ).shape == (5,)


def _weights(device: str, dtype: torch.dtype, layer: bool) -> ExitWeights:
    size, units = 48, 9
    own = [1 + torch.randn(size) / 5, torch.randn(size), torch.randn(size, size) / size**0.5]
    norm, bias, adapter = (part.to(device, dtype) for part in own)
    probe = (torch.randn(units, size) / 7, torch.randn(units), torch.randn(units), torch.tensor(3.0))
    a, b, c, d = (part.to(device) for part in probe)
    return ExitWeights(norm, bias if layer else None, 1e-5, adapter, (a, b, c, d))


@pytest.mark.parametrize(
    ("layer", "dtype"), [(layer, dtype) for layer in (False, True) for dtype in STATE_TOLERANCE]
)
@pytest.mark.usefixtures("dispatched")
def test_state(device: str, layer: bool, dtype: torch.dtype) -> None:
    weights = _weights(device, dtype, layer)
    hidden = torch.randn(9, 48, device=device).to(dtype)
    state, logit, units = exit_state(hidden, weights)
    assert state.dtype == dtype
    assert logit.dtype == units.dtype == torch.float32
    norm = (weights.norm, weights.norm_bias, weights.eps)
    expected = exit_state_reference(hidden, norm, weights.adapter, weights.probe)
    for found, wanted in zip((state, logit, units), expected, strict=True):
        distance = (found.double() - wanted.double()).norm() / wanted.double().norm()
        assert float(distance) < STATE_TOLERANCE[dtype]
    # what reads the state reads it as it is, rounded
    again = (probe_units_reference(state, weights.probe), probe_output_reference(units, weights.probe))
    torch.testing.assert_close(units, again[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logit, again[1], atol=1e-4, rtol=1e-4)
    alone = exit_state(hidden[4:5], weights)
    assert all(torch.equal(one[0], every[4]) for one, every in zip(alone, (state, logit, units), strict=True))
    with pytest.raises(ValueError, match=r"expected \[tokens, 48\]"):
        exit_state(hidden[:, :4], weights)


@pytest.mark.parametrize("dtype", STATE_TOLERANCE)
@pytest.mark.usefixtures("dispatched")
def test_a_gate_decides_by_the_state_that_it_gives(device: str, dtype: torch.dtype) -> None:
    """In any dtype of the states: of the same state and units PyTorch decides alike."""
    matrix = torch.randn(300, 48, device=device).to(dtype) / 4
    nobody = torch.full((13,), torch.inf, device=device)

    def project(state: Tensor) -> Tensor:
        return full_linear(state, matrix)

    for _ in range(30):  # until the probe lets some rows be looked at
        weights, hidden = _weights(device, dtype, True), torch.randn(13, 48, device=device).to(dtype)
        rule = GateRule(torch.tensor([0.5, 0.4, 0.2, 0.0], device=device), 0.7, _judge(9, 5, device))
        rows = gate_rows(hidden, nobody, weights, rule, project)
        assert rows.state.dtype == dtype
        assert rows.logits.dtype == torch.float32
        assert torch.equal(rows.logits, project(rows.state).float())
        units = probe_units_reference(rows.state, weights.probe)
        probe = probe_output_reference(units, weights.probe)
        every = torch.zeros_like(nobody)
        sure = gate_decisions_reference(probe, units, rows.logits, every, rule)[0]
        thresholds = sure * torch.tensor([0.9, 1.1], device=device).repeat(7)[:13]
        expected = gate_decisions_reference(probe, units, rows.logits, thresholds, rule)
        if 0 < int(expected[1].sum()) < 13:
            break
    found = gate_rows(hidden, thresholds, weights, rule, project)
    torch.testing.assert_close(found.confidence, expected[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(found.leaves, expected[1])
    assert 0 < int(found.leaves.sum()) < 13
