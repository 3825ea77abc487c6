"""Heads, gates and projections in CUDA graphs: to the bit what they are without, whatever runs between."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.compression.exits import GateResult
from exeunt.compression.graph_pool import GraphPool
from exeunt.compression.linear import FullLinear, Int4Linear
from exeunt.compression.row_graphs import StepGraphs
from exeunt.kernels.int4_linear import quantize
from tests.compression.gpu.exit_forms import FORMS, Form, exit_of_form
from tests.compression.reference_models import build_model, save

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS = (1, 3, 8, 5, 17, 1, 100, 128, 130, 3)
UNITS = 9


def _decoder(folder: Path, family: str, weights: str) -> Decoder:
    device = torch.device("cuda")
    model = build_model(family, torch.bfloat16, vocab_size=2100)
    decoder = Decoder.load(save(model, folder), device=device, dtype=torch.bfloat16)
    if weights == "int4":
        assert isinstance(decoder.output, FullLinear)
        decoder.let_exits_read(Int4Linear(quantize(decoder.output.weight, 16), None))
    return decoder


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_head(tmp_path: Path, family: str) -> None:
    decoder = _decoder(tmp_path, family, "full")
    states = [torch.randn(n, decoder.spec.hidden_size, device="cuda").bfloat16() for n in ROWS]
    with torch.inference_mode():
        plain = [decoder.head(state) for state in states]
        assert decoder.capture(64) is not None
        captured = [decoder.head(state) for state in states]
        again = [decoder.head(state) for state in states]
    for one, two, three in zip(plain, captured, again, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    graphs = decoder.step_graphs
    assert graphs is not None
    assert graphs.count == 5  # of 1, 4, 8, 24 and 128 rows, each once
    assert decoder.resident_bytes()["cuda_graphs"] == graphs.pool.nbytes > 0
    assert graphs.pool.seconds > 0
    decoder.release_graphs()
    assert decoder.resident_bytes()["cuda_graphs"] == 0


@pytest.mark.parametrize("weights", ["full", "int4"])
@pytest.mark.parametrize("form", FORMS)
def test_gate(tmp_path: Path, weights: str, form: Form) -> None:
    decoder = _decoder(tmp_path, "llama", weights)
    head = exit_of_form(decoder, 1, form, seed=8, units=UNITS, listed=2100)
    generator = torch.Generator().manual_seed(3)
    states = [torch.randn(n, decoder.spec.hidden_size, generator=generator).bfloat16().cuda() for n in ROWS]
    with torch.inference_mode():
        sure = head.gate(states[7], torch.zeros(128), decoder.project_exit).confidence

        def gate(state: Tensor, threshold: float) -> GateResult:
            thresholds = torch.full((len(state),), threshold).pin_memory()
            thresholds[1::7] = torch.inf
            return head.gate(state, thresholds, decoder.project_exit)

        levels = [float(sure.quantile(share)) for share in (0.0, 0.5, 0.9)] + [torch.inf]
        asks = [(state, level) for level in levels for state in states]
        plain = [gate(*ask) for ask in asks]
        assert decoder.capture(64) is not None
        captured = [gate(*ask) for ask in asks]
    assert any(0 < int(found.leaves.sum()) < len(found.leaves) for found in plain)
    for one, two in zip(plain, captured, strict=True):
        for name in ("confidence", "leaves", "looked", "whole", "logits"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name
        assert two.leaves.device.type == "cpu"
        assert two.logits.is_cuda


@pytest.mark.parametrize("form", FORMS)
def test_a_gate_waits_once_and_a_head_never(tmp_path: Path, form: Form) -> None:
    decoder = _decoder(tmp_path, "llama", "full")
    head = exit_of_form(decoder, 1, form, seed=8, units=UNITS, listed=2100)
    state = torch.randn(5, decoder.spec.hidden_size, device="cuda").bfloat16()
    thresholds = torch.tensor([0.0, torch.inf, 0.0, 0.0, 0.0]).pin_memory()
    with torch.inference_mode(), warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        assert decoder.capture(64) is not None
        for _ in range(2):
            head.gate(state, thresholds, decoder.project_exit)
            decoder.head(state)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            waits.clear()  # the mode itself warns that it does not see every wait
            decoder.head(state)
            assert not waits, [str(each.message) for each in waits]
            head.gate(state, thresholds, decoder.project_exit)
            assert len(waits) <= 1, [str(each.message) for each in waits]
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_decoders_share_what_they_have_in_common(tmp_path: Path) -> None:
    decoder = _decoder(tmp_path, "llama", "full")
    twin = Decoder.load(tmp_path, device="cuda", dtype=torch.bfloat16)
    shared = StepGraphs(GraphPool(torch.device("cuda")))
    state = torch.randn(2, decoder.spec.hidden_size, device="cuda").bfloat16()
    with torch.inference_mode():
        for each in (decoder, twin, decoder):
            if each.step_graphs is None:
                each.capture(64, shared)
            each.head(state)
    assert shared.count == 2  # embedding and output are each decoder's own here
    assert decoder.resident_bytes()["cuda_graphs"] == twin.resident_bytes()["cuda_graphs"] > 0


def test_a_capture_that_fails_leaves_everything_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = StepGraphs(GraphPool(torch.device("cuda")))
    stream = torch.cuda.current_stream()

    def fails(x: Tensor) -> tuple[Tensor]:
        twice = 2 * x
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory: no room")
        return (twice,)

    x = torch.ones(3, 4, device="cuda")
    assert graphs.run(("a failure",), fails, x) is None
    assert "of a failure of 4 rows cannot be captured, such passes run without: CUDA out of" in caplog.text
    assert torch.cuda.current_stream() == stream
    found = graphs.run(("twice",), lambda x: (2 * x,), x)
    assert found is not None
    assert torch.equal(found[0], 2 * x)


def test_a_capture_that_the_driver_cuts_off_is_the_last_and_harms_no_graph(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = StepGraphs(GraphPool(torch.device("cuda")))
    x = torch.ones(3, 4, device="cuda")

    def waits(x: Tensor) -> tuple[Tensor]:
        return (x * x.sum().item(),)

    assert graphs.run(("twice",), lambda x: (2 * x,), x) is not None
    assert graphs.run(("waits",), waits, x) is None
    assert "the driver cut one off: passes of sizes not yet met run without" in caplog.text
    assert graphs.run(("thrice",), lambda x: (3 * x,), x) is None
    found = graphs.run(("twice",), lambda x: (2 * x,), 5 * x)
    assert found is not None
    assert torch.equal(found[0], 10 * x)
    assert torch.equal(
        torch.cat([x, x]).sum(), torch.tensor(24.0, device="cuda")
    )  # passes without graphs go on
