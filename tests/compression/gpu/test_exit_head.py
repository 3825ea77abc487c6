"""An exit's head on a GPU: what its gate decides is what its steps, one after another, decide in plain PyTorch."""

from unittest import mock

import pytest
import torch
from torch import Tensor

import exeunt.kernels.gpu
from exeunt.compression.exit_output import Shortlist
from exeunt.compression.exits import ExitConfirmation, ExitHead, ExitJudge, ExitProbe, GateResult
from exeunt.compression.norm import Norm
from exeunt.kernels.exit_gate import gate_rows
from tests.kernels.triton.on_gpu import on_gpu_only, poison

# The interpreter computes with numpy, which warns of what kernels do on purpose: NaN and infinity in arithmetic.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")


def _judge(units: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.randn(count, units), torch.randn(units), torch.randn(units) / units**0.5, torch.randn(())


def _head(
    device: torch.device, dtype: torch.dtype, layer: bool, judged: bool, listed: bool, confirmed: bool = False
) -> ExitHead:
    size, units, vocab = 48, 9, 300
    norm = Norm(
        "layer" if layer else "rms", 1 + torch.randn(size) / 5, torch.randn(size) if layer else None, 1e-5
    )
    probe = ExitProbe(torch.randn(units, size) / 7, torch.randn(units), torch.randn(units), torch.tensor(3.0))
    judge = ExitJudge(*_judge(units, 5)) if judged else None
    shortlist = Shortlist(torch.arange(0, vocab, 3)) if listed else None
    combine = torch.tensor([0.5, 0.4, 0.2, 0.0])
    adapter = torch.randn(size, size) / size**0.5
    last = None
    if confirmed:
        last = ExitConfirmation(ExitJudge(*_judge(units, 6)), combine / 2, 0.2)
    screen = 0.1 if confirmed else 0.7
    return ExitHead(3, norm, adapter, probe, combine, screen, judge, shortlist, last).to(device, dtype)


@pytest.mark.parametrize(
    ("layer", "judged", "listed", "confirmed", "parts"),
    [
        (False, False, False, False, 512),
        (True, True, False, False, 5),
        (False, True, True, False, 512),
        (False, True, True, True, 512),
        on_gpu_only(False, False, False, False, 5),
        on_gpu_only(True, True, False, False, 512),
        on_gpu_only(False, True, True, False, 5),
        on_gpu_only(True, True, True, True, 5),
    ],
)
def test_a_gate_is_that_of_separate_steps(
    device: torch.device,
    layer: bool,
    judged: bool,
    listed: bool,
    confirmed: bool,
    parts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poison(monkeypatch)
    of_sure = torch.tensor([0.5, 1.5, torch.inf, 0.9, 1.1, 0.8, 1.2, 0.5, 0.5, 0.5, 1.1, 1.1, 0.9])
    for _ in range(50):  # until some rows leave, and with a confirmation some that the list lets pass do not
        head = _head(device, torch.float32, layer, judged, listed, confirmed)
        matrix = torch.randn(300, 48, device=device) / 4
        hidden = torch.randn(13, 48, device=device)
        sure = _gate_on_cpu(head, hidden, torch.zeros(13), matrix).confidence.to(device)
        thresholds = sure * of_sure.to(device)
        hidden[4, 7] = torch.nan
        expected = _gate_on_cpu(head, hidden, thresholds, matrix)
        if 0 < int(expected.leaves.sum()) < len(expected.whole) + (not confirmed):
            break

    def project(state: Tensor) -> Tensor:
        return torch.cat([row[None] @ matrix.T for row in state]) if len(state) else state @ matrix.T

    monkeypatch.setattr("exeunt.compression.gate_steps.ROWS_AT_ONCE", parts)
    found = head.gate(hidden, thresholds, project)
    torch.testing.assert_close(found.confidence.cpu(), expected.confidence, atol=1e-4, rtol=1e-4)
    near = ((expected.confidence - thresholds.cpu()).abs() < 1e-4).cpu()
    assert torch.equal(found.leaves.cpu()[~near], expected.leaves[~near])
    assert found.looked.tolist() == expected.looked.tolist()
    assert found.whole.tolist() == expected.whole.tolist()
    if confirmed:
        assert bool(found.leaves[found.whole].sum() == found.leaves.sum())
        assert len(found.whole) > int(found.leaves.sum())  # some the list lets pass, and all logits do not
    assert not bool(found.leaves[[2, 4]].any())
    assert 0 < int(found.leaves.sum()) < 13
    assert found.logits.shape == (int(found.leaves.sum()), 300)
    state = head.read(hidden[found.leaves])[0]
    torch.testing.assert_close(found.logits, project(state), atol=1e-4, rtol=1e-4)
    if confirmed and head.shortlist is not None:
        rows = gate_rows(hidden, thresholds, head.weights, head.rule, project, head.shortlist.ids)
    else:
        rows = gate_rows(
            hidden, thresholds, head.weights, head.rule, lambda state: head.decisive(project(state))
        )
    assert torch.equal(rows.leaves.cpu(), found.leaves)
    nobody = head.gate(hidden, torch.full_like(thresholds, torch.inf), project)
    assert not bool(nobody.leaves.any())
    assert len(nobody.looked) == len(nobody.logits) == 0
    assert len(head.gate(hidden[:0], thresholds[:0], project).confidence) == 0


def _gate_on_cpu(head: ExitHead, hidden: Tensor, thresholds: Tensor, matrix: Tensor) -> GateResult:
    there = head.to("cpu", torch.float32)
    with mock.patch.object(exeunt.kernels.gpu, "interpreted", False):
        return there.gate(hidden.cpu(), thresholds.cpu(), lambda state: state @ matrix.cpu().T)


@pytest.mark.gpu
def test_without_triton_a_gpus_gate_takes_thresholds_from_the_host_and_decides_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr("exeunt.compression.exits.triton_runs", lambda _: False)
    monkeypatch.setattr("exeunt.kernels.exit_gate.dispatch.triton_runs", lambda _: False)
    there = torch.device("cuda")
    head = _head(there, torch.float32, layer=False, judged=True, listed=True, confirmed=True)
    matrix, hidden = torch.randn(300, 48, device=there) / 4, torch.randn(13, 48, device=there)
    result = head.gate(hidden, torch.zeros(13), lambda state: state @ matrix.T)
    assert bool(result.leaves.all())
    assert result.logits.is_cuda
    assert not any(part.is_cuda for part in (result.confidence, result.leaves, result.looked, result.whole))
