"""What a gate took, apart from captures and from the blocks in front of it."""

import time

import pytest
import torch

from exeunt.server.gate_timer import GateTimer


def test_on_a_cpu_it_is_the_clocks() -> None:
    now = [10.0]
    timer = GateTimer(torch.device("cpu"), lambda: now[0], lambda: 0.0)
    now[0] = 10.5
    assert timer.seconds() == 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_what_runs_before_does_not_count() -> None:
    device = torch.device("cuda")
    torch.ones(8, device=device).sum().item()  # what is loaded at first is not timed
    torch.cuda._sleep(1_000_000_000)  # half a second
    began = time.perf_counter()
    timer = GateTimer(device, time.perf_counter, lambda: 0.0)
    torch.ones(8, device=device).sum().item()
    assert time.perf_counter() - began > 0.2
    assert 0 < timer.seconds() < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_captures_do_not_count() -> None:
    captured = [0.0]
    timer = GateTimer(torch.device("cuda"), time.perf_counter, lambda: captured[0])
    time.sleep(0.05)
    captured[0] = 0.05
    assert timer.seconds() < 0.02
