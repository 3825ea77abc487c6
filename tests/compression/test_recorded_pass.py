"""Passes of a decoder in graphs that are recorded: to the bit what they are without, in all forms and formats."""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import exeunt.compression.decoder
import exeunt.compression.model
import exeunt.kernels.gpu
from exeunt.compression.decoder import Decoder
from exeunt.compression.variant import KVFormat
from tests.compression.gpu.exit_forms import FORMS, Form, exit_of_form
from tests.compression.gpu.prepared_pass import check_pass
from tests.compression.gpu.test_gpu_block import LENGTH, TEXT, _decoder, _states
from tests.compression.paged_generation import Sequences
from tests.compression.recorded_gpu import RecordedGPU, recorded_gpu
from tests.compression.staged_pass import ALL, STEP, Case


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordedGPU]:
    """A GPU whose graphs are recorded."""
    with recorded_gpu(monkeypatch) as found:
        yield found


def _patched() -> list[object]:
    """Some of what `recorded_gpu` replaces."""
    pytest.importorskip("triton", reason="needs the package triton")
    full_linear = importlib.import_module("exeunt.kernels.full_linear.triton")._full_linear_op
    pools = [vars(module)["GraphPool"] for module in (exeunt.compression.decoder, exeunt.compression.model)]
    return [*pools, Decoder.capture, exeunt.kernels.gpu.interpreted, full_linear._backend_fns[None]]


def test_nothing_of_it_stays_when_a_test_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _patched()
    with monkeypatch.context() as patch, recorded_gpu(patch):
        assert all(now != then for now, then in zip(_patched(), before, strict=True))
    assert _patched() == before


def _capture(decoder: Decoder) -> None:
    assert decoder.capture(64) is not None


@pytest.mark.parametrize(
    ("cases", "forms", "weights", "kv"),
    [
        (ALL, ("whole", "whole"), "full", "full"),
        (ALL, ("confirmed", "listed"), "int4", "full"),
        (ALL, ("listed", "confirmed"), "full", "int4"),
        (STEP, ("confirmed", "whole"), "int4", "int4"),
        ([case for case in ALL if not case.asks], ("whole", "whole"), "int4", "int4"),
        (STEP[:1], ("whole", "whole"), "int4", "int4"),
    ],
)
def test_a_pass_of_the_device_is_the_one_that_asks(
    tmp_path: Path,
    gpu: RecordedGPU,
    cases: Sequence[Case],
    forms: tuple[Form, Form],
    weights: str,
    kv: KVFormat,
) -> None:
    decoder = _decoder("llama", tmp_path, torch.device("cpu"), torch.bfloat16, weights, num_hidden_layers=3)
    check_pass(decoder, kv, forms, cases, shares=(0.0, 0.1, 0.3, 0.6, 0.9), rounds=2, capture=_capture)
    assert gpu.replays >= 10 > gpu.captures > 0


@pytest.mark.parametrize(
    ("name", "weights", "kv"),
    [
        ("gpt2", "full", "full"),
        ("mistral", "full", "int4"),
        ("qwen3", "int4", "int4"),
        ("llama", "int4", "full"),
    ],
)
def test_captured_passes_give_the_states_of_others_to_the_bit(
    name: str, weights: str, kv: KVFormat, tmp_path: Path, gpu: RecordedGPU
) -> None:
    decoder = _decoder(name, tmp_path, torch.device("cpu"), torch.bfloat16, weights, True)
    rows, chunks = [*TEXT], [3, 1, 1, LENGTH - 5]
    plain = _states(decoder, kv, rows, chunks)
    _capture(decoder)
    assert torch.equal(_states(decoder, kv, rows, chunks), plain)
    assert gpu.replays == len(chunks)
    assert gpu.captures == 2  # of 2 tokens, and of 8


@pytest.mark.parametrize(("weights", "kv"), [("full", "full"), ("int4", "int4")])
def test_captured_projections_write_the_bits_of_others(
    weights: str, kv: KVFormat, tmp_path: Path, gpu: RecordedGPU
) -> None:
    decoder = _decoder("llama", tmp_path, torch.device("cpu"), torch.bfloat16, weights)
    plain, captured = (Sequences(decoder, rows=2, max_tokens=20, format=kv) for _ in range(2))
    hidden = torch.randn(12, decoder.spec.hidden_size, generator=torch.Generator().manual_seed(3)).bfloat16()
    spans = [[range(3), range(2)], [range(3, 4), range(2, 3)], [range(4, 10), range(3, 9)]]
    spans += [[range(10, 11), range(9, 10)], [range(11, 12)], [range(12, 13)]]

    def project(sequences: Sequences) -> None:
        for batch in map(sequences.batch, spans):
            decoder.project_kv(hidden[: batch.tokens].clone(), batch, sequences.pages, 0, 2)

    with torch.inference_mode():
        project(plain)
        _capture(decoder)
        project(captured)
    assert torch.equal(captured.pages.arena, plain.pages.arena)
    assert (gpu.captures, gpu.replays) == (4, len(spans))


@pytest.mark.parametrize("form", FORMS)
def test_captured_heads_and_gates_are_the_same_bits(form: Form, tmp_path: Path, gpu: RecordedGPU) -> None:
    decoder = _decoder("llama", tmp_path, torch.device("cpu"), torch.bfloat16, "full")
    head = exit_of_form(decoder, 1, form, seed=8, units=9, listed=105)
    generator = torch.Generator().manual_seed(3)
    states = [
        torch.randn(n, decoder.spec.hidden_size, generator=generator).bfloat16()
        for n in (1, 3, 17, 8, 130, 3)
    ]

    def found(level: float) -> list[Tensor]:
        heads = [decoder.head(state.clone()) for state in states]
        gates = [
            head.gate(each.clone(), torch.full((len(each),), level), decoder.project_exit) for each in states
        ]
        return heads + [
            getattr(gate, name) for gate in gates for name in ("confidence", "leaves", "looked", "logits")
        ]

    with torch.inference_mode():
        sure = head.gate(states[4], torch.zeros(130), decoder.project_exit).confidence
        levels = [float(sure.quantile(share)) for share in (0.0, 0.5, 0.9)]
        plain = [found(level) for level in levels]
        _capture(decoder)
        captured = [found(level) for level in levels]
    for one, two in zip(plain, captured, strict=True):
        assert all(torch.equal(mine, yours) for mine, yours in zip(one, two, strict=True))
    assert gpu.replays > gpu.captures > 0
